"""Guard of a process group: kills the group when this process ends, however it ends.

The kernel closes the write end of a pipe with the last process that holds it, so the guard, a small
process that reads the other end, learns at once that this process was killed. That holds for every
process of the group: launchers of others too, which look for their parents every few seconds or
never, and ranks that are still starting.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# -I and -S: starts in a hundredth of a second and imports nothing of anyone
_GUARD = """
import os, signal, sys
sys.stdin.read()
try:
    os.killpg(int(sys.argv[1]), signal.SIGKILL)
except ProcessLookupError:
    pass
"""


@contextmanager
def group_ends_with_this_process(group: int) -> Iterator[None]:
    """Guard a process group while the block runs.

    Args:
        group: Number of the process group, which this process started.
    """
    reader, writer = os.pipe()  # neither is inherited by other children
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _GUARD, str(group)],
        stdin=reader,
        start_new_session=True,
    )
    os.close(reader)
    try:
        yield
    finally:
        guard.kill()  # before the pipe is closed: the group has ended, or is ended by the caller
        guard.wait()
        os.close(writer)
