"""Fork server: Python processes that start with everything imported, in a tenth of the time.

multiprocessing's fork server imports what a training job imports, once for each test process; a
process is a fork of it in which `python ARGUMENTS` runs as it would in a new one
(forked_python.py).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# A module that does not exist is passed over. Forks write their command lines over the server's.
ROOM = "room_for_a_command_line_" * 100
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.warm_imports", ROOM])


class ForkedPython:
    """A process of `start_python`, with the methods of subprocess.Popen that tests use."""

    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process
        self.pid = process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code, negative for a signal; None while the process runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Same as `returncode`."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Exit code once the process has ended. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL, unless the process has ended."""
        self.send_signal(signal.SIGKILL)


def start_python(
    arguments: list[str],
    environment: dict[str, str],
    stdout: Path,
    stderr: Path | None = None,
    cwd: Path | None = None,
    new_session: bool = False,
) -> ForkedPython:
    """Run `python ARGUMENTS` in a forked process.

    Args:
        arguments: As after `python`: a file, -m and a module, or -c and source; then its
            arguments.
        environment: The whole environment of the process.
        stdout: File that is written.
        stderr: File that is written; None is that of stdout.
        cwd: Working directory; None is the root of the repository.
        new_session: Whether the process leads a session of its own.
    """
    sys.audit("subprocess.Popen", sys.executable, arguments, cwd, environment)
    files = str(stdout), str(stderr or "")
    process = _context.Process(
        target=_run,
        args=(arguments, environment, files, str(cwd or ROOT), new_session),
        name=stdout.stem,
    )
    folder = Path.cwd()
    os.chdir(ROOT)  # the server starts in this folder, and imports from it
    try:
        process.start()
    finally:
        os.chdir(folder)
    return ForkedPython(process)


def _run(
    arguments: list[str],
    environment: dict[str, str],
    files: tuple[str, str],
    cwd: str,
    new_session: bool,
) -> None:
    if "deepspeed" not in sys.modules:
        raise RuntimeError("the fork server did not import tests.support.warm_imports")
    from tests.support.forked_python import run_python

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for "&"
    if new_session:
        os.setsid()
    stdout, stderr = files
    _write_to(stdout, 1)
    if stderr:
        _write_to(stderr, 2)
    else:
        os.dup2(1, 2)
    sys.exit(run_python(arguments, environment, cwd))


def _write_to(path: str, descriptor: int) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, descriptor)
    os.close(file)
