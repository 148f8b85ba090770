"""User-facing errors and process exit codes.

The message of each error is one line: what is wrong, the value, what was expected, what to do.
"""

from __future__ import annotations

import errno
import sys
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO, TypeVar

if TYPE_CHECKING:
    from pydantic import ValidationError

# Exit codes; docs/reliability.md says what to do about each. Numbers above 63 are those of
# sysexits.h.
EXIT_CRASHED = 1  # an error of the program; a traceback was shown
EXIT_USER_ERROR = 2  # an error that the user must fix first
EXIT_RUN_IN_USE = 4  # another job works in the run folder
# EX_DATAERR: the run has checkpoints and none is valid; the user must look
EXIT_NO_VALID_CHECKPOINT = 65
EXIT_REQUEUE = 75  # EX_TEMPFAIL: asked to stop; the same command continues
# No progress: a rank or the network does not answer; the same command continues on sound machines
EXIT_HUNG = 76

LONGEST_MESSAGE = 2_000  # characters of an error
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}


class DeprecatedNameWarning(FutureWarning):
    """A config key or a flag by its old name, which will soon be an error."""


class InputWarning(UserWarning):
    """A part of the user's input that is left out, or not read as it is written."""


def print_warnings_to_users() -> None:
    """Print warnings that are for users as one line, without file and line. Others as before."""
    show = warnings.showwarning

    def print_line(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, DeprecatedNameWarning | InputWarning):
            print(f"warning: {message}", file=file or sys.stderr, flush=True)
        else:
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = print_line


def print_notice(text: str) -> None:
    """Print a line for the user on stderr; a log on a full disk goes without."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class UserError(Exception):
    """An error that the user can fix; shown without a traceback.

    Attributes:
        exit_code: Exit code of the process.
        every_rank: Whether each rank prints the error because it is that rank's own (its disk is
            full, its shard is corrupt). Other errors are the same on all ranks, and rank 0 prints
            them.
    """

    exit_code = EXIT_USER_ERROR
    every_rank = False

    def __str__(self) -> str:
        """The message; the middle of a longer one than LONGEST_MESSAGE is left out.

        Values of damaged files are quoted in messages, and may have any length.
        """
        text = super().__str__()
        if len(text) <= LONGEST_MESSAGE:
            return text
        half = LONGEST_MESSAGE // 2 - 50
        return f"{text[:half]} [{len(text) - 2 * half:,} characters] {text[-half:]}"


Error = TypeVar("Error", bound=UserError)


def same_on_all_ranks(error: Error) -> Error:
    """Mark an error that all ranks raise alike, so that only rank 0 prints it; returns it."""
    error.every_rank = False
    return error


def describe_os_error(error: OSError) -> str:
    """One line: the file, what the system says of it, and what to do."""
    text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if error.errno in DISK_FULL:
        return f"{text}; free some space"
    if error.errno in NOT_WRITABLE:
        return f"{text}; give a folder that this user can write"
    return text


def first_problem(error: ValidationError) -> str:
    """One line: the first key that pydantic refuses, and why."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


class ConfigError(UserError):
    """A key or value of the config is wrong."""


class DataError(UserError):
    """A dataset is missing, damaged, or not the one that the config describes."""

    every_rank = True


class DataPrepError(DataError):
    """A corpus, tokenizer or dataset cannot be prepared or read as it is."""


class StoreError(UserError):
    """An object store refuses or cannot be reached, or an address names no store."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or of another run."""

    every_rank = True


class CheckpointSaveError(CheckpointError):
    """The disk or the system refused a checkpoint, on the same save for all ranks.

    Nothing of the checkpoint is left; earlier ones are intact.

    Attributes:
        rank: First rank that failed.
        number: errno of the failure; None where the system gave none.
    """

    every_rank = False

    def __init__(self, message: str, rank: int, number: int | None) -> None:
        super().__init__(message)
        self.rank = rank
        self.number = number


class NoValidCheckpointError(CheckpointError):
    """A run folder holds checkpoints and none of them verifies.

    The user has to look: to start from nothing would lose the run.
    """

    exit_code = EXIT_NO_VALID_CHECKPOINT


class ScalingError(UserError):
    """Runs that no scaling law can be fitted to, or a question that a fit cannot answer."""


class RunInUseError(UserError):
    """Another job works in the run folder, or took it over from this one."""

    exit_code = EXIT_RUN_IN_USE


class TrainingStopped(Exception):
    """Training ended before its last step because it was asked to stop.

    Not a user error; the message says how to continue.
    """

    exit_code = EXIT_REQUEUE
