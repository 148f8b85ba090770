"""Mistakes that a person can mend, and what a process ends with.

Each message is one line that names the thing and the way out.
"""

# Exit codes; docs/reliability.md says what to do about each. Numbers above 63 are those of
# sysexits.h.
EXIT_CRASHED = 1  # an error of the program; a traceback was shown
EXIT_USER_ERROR = 2  # something that a person must mend first
EXIT_RUN_IN_USE = 4  # another job works in the run folder
EXIT_NO_VALID_CHECKPOINT = (
    65  # EX_DATAERR: the run has checkpoints and none of them is valid; a person must look
)
EXIT_REQUEUE = 75  # EX_TEMPFAIL: told to stop; the same command goes on
# No progress: a rank or the network does not answer; the same command goes on, on sound machines
EXIT_HUNG = 76


class UserError(Exception):
    """A mistake of the user's. Shown without a traceback.

    exit_code: what the process ends with.

    every_rank: the error is this rank's own (its disk is full, its shard is corrupt), so this rank
    must print it; other errors are the same on all ranks and rank 0 speaks for them.
    """

    exit_code = EXIT_USER_ERROR
    every_rank = False


class ConfigError(UserError):
    """A key or value of the config."""


class DataError(UserError):
    """A dataset that is missing, damaged or not the one that the config describes."""

    every_rank = True


class DataPrepError(DataError):
    """A corpus, a tokenizer or a dataset that cannot be prepared or read as it is."""


class StoreError(UserError):
    """A store that refuses or cannot be reached, or an address that names no store."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another run."""

    every_rank = True


class CheckpointSaveError(CheckpointError):
    """The disk did not take a checkpoint; none of it was left, and those before it are whole.

    The same on every rank.

    rank: the first that failed. number: errno of what happened there, None where the system gave
    none.
    """

    every_rank = False

    def __init__(self, message: str, rank: int, number: int | None) -> None:
        super().__init__(message)
        self.rank, self.number = rank, number


class NoValidCheckpointError(CheckpointError):
    """A run folder holds checkpoints and none of them verifies: a person must look.

    To start again would lose the run.
    """

    exit_code = EXIT_NO_VALID_CHECKPOINT


class ScalingError(UserError):
    """Runs that no scaling law can be fitted to, or a question that a fit cannot answer."""


class RunInUseError(UserError):
    """Another job works in the run folder, or took it from this one."""

    exit_code = EXIT_RUN_IN_USE


class TrainingStopped(Exception):
    """Training ended before its last step because it was told to.

    Not a mistake; the message says how to go on.
    """

    exit_code = EXIT_REQUEUE
