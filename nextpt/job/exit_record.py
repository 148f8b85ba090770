"""Exit record: how a job ended, in RUN/exit.json, for scripts and launchers that lose exit codes.

The file exists only when a job of this folder ended and could still write it. Each start removes
the one of the job before. A folder without one holds a job that runs, or one that was killed.
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
EXIT_INTERRUPTED = 130  # of shells, after SIGINT


class ExitRecord:
    """What is known of a job before it ends.

    Attributes:
        step: Number of completed steps.
    """

    def __init__(self) -> None:
        self.step = 0


def write_exit_record(run: Path, code: int, reason: str, step: int) -> None:
    """Write RUN/exit.json.

    A disk that cannot be written is ignored: the error that ended the job matters more.

    Args:
        run: The run folder.
        code: Exit code; those of nextpt/base/errors.py, 0, or 130.
        reason: One line for the user.
        step: Number of completed steps.
    """
    record = {
        "code": code,
        "reason": reason,
        "step": step,
        "time": time.time(),
        "host": platform.node(),
    }
    with suppress(OSError), atomic_write(run / NAME) as file:
        file.write(canonical_json(record))


def read_exit_record(run: Path) -> dict[str, Any] | None:
    """Read what `write_exit_record` wrote; None when there is no readable record."""
    try:
        record: dict[str, Any] = json.loads((run / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record


def remove_exit_record(run: Path) -> None:
    """Remove the record of the job before."""
    (run / NAME).unlink(missing_ok=True)


@contextmanager
def record_exit(run: Path) -> Iterator[ExitRecord]:
    """Run the block and record how it ended; for the rank that holds the lock.

    A job that lost the folder to another job records nothing.
    """
    record = ExitRecord()
    try:
        yield record
    except (UserError, TrainingStopped) as error:
        if error.exit_code != EXIT_RUN_IN_USE:
            write_exit_record(run, error.exit_code, str(error), record.step)
        raise
    except BaseException as error:
        code = EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_CRASHED
        write_exit_record(run, code, f"{type(error).__name__}: {error}".strip(), record.step)
        raise
    write_exit_record(run, 0, "finished", record.step)
