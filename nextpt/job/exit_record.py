"""Exit record: how a job ended, in RUN/exit.json, for scripts and launchers that lose exit codes.

The file exists only when a job of this folder ended and could still write it. Each start removes
the one of the job before. A folder without one holds a job that runs, or one that was killed.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_fixed

from nextpt.base.errors import (
    DISK_FULL,
    EXIT_CRASHED,
    EXIT_RUN_IN_USE,
    TrainingStopped,
    UserError,
    describe_os_error,
    print_notice,
)
from nextpt.base.files import atomic_write, canonical_json
from nextpt.base.json_files import read_json

ATTEMPTS = 3
PAUSE = 1.0  # seconds between two attempts to write to a full disk
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

    A disk that refuses is tried again and then reported: the error that ended the job matters more.

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
    attempts = Retrying(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_fixed(PAUSE),
        retry=retry_if_exception(lambda error: getattr(error, "errno", None) in DISK_FULL),
        reraise=True,
    )
    try:
        attempts(_write, run / NAME, record)
    except OSError as error:
        print_notice(f"warning: the end of this job is not recorded: {describe_os_error(error)}")


def _write(path: Path, record: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write(canonical_json(record))


def read_exit_record(run: Path) -> dict[str, Any] | None:
    """Read what `write_exit_record` wrote; None when there is no readable record."""
    try:
        record = read_json(run / NAME)
    except (OSError, ValueError):
        return None
    is_whole = (
        isinstance(record, dict)
        and type(record.get("code")) is int
        and 0 <= record["code"] < 256
        and isinstance(record.get("reason"), str)
        and type(record.get("step")) is int
    )
    return record if is_whole else None


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
