"""How a run ended: RUN/exit.json, for scripts and for launchers that lose exit codes.

It is there only when a job of this folder came to an end that it could still write down. A start
removes that of the job before it; so a folder without one holds a job that runs, or one that was
killed.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nextpt.base.errors import EXIT_CRASHED, EXIT_RUN_IN_USE, TrainingStopped, UserError
from nextpt.base.files import atomic_write, canonical_json

NAME = "exit.json"


class Progress:
    """The last step that was made, for the record of the end."""

    step = 0


def write_exit_record(run: Path, code: int, reason: str, step: int) -> None:
    """Write RUN/exit.json.

    Silent where that cannot be done, for the reason of the end must not be lost over it.
    """
    with suppress(OSError), atomic_write(run / NAME) as file:
        file.write(
            canonical_json(
                {
                    "code": code,
                    "reason": reason,
                    "step": step,
                    "time": time.time(),
                    "host": platform.node(),
                }
            )
        )


def read_exit_record(run: Path) -> dict[str, Any] | None:
    """What `write_exit_record` wrote; None when there is none."""
    try:
        return json.loads((run / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def remove_exit_record(run: Path) -> None:
    """Remove the record of the job before."""
    (run / NAME).unlink(missing_ok=True)


@contextmanager
def record_exit(run: Path) -> Iterator[Progress]:
    """Run the block and record how it ended. For the rank that holds the lock.

    A job that lost the folder to another records nothing: the folder is the other's.
    """
    progress = Progress()
    try:
        yield progress
    except (UserError, TrainingStopped) as end:
        if end.exit_code != EXIT_RUN_IN_USE:
            write_exit_record(run, end.exit_code, str(end), progress.step)
        raise
    except BaseException as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else EXIT_CRASHED
        write_exit_record(run, code, f"{type(error).__name__}: {error}".strip(), progress.step)
        raise
    write_exit_record(run, 0, "finished", progress.step)
