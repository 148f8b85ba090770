"""Mistakes that a person can mend. Each message is one line that names the thing and the way out."""


class UserError(Exception):
    """A mistake of the user's. Shown without a traceback.

    exit_code: what the process ends with. 2 unless a script that starts runs should tell this error from the others.

    every_rank: the error is this rank's own (its disk is full, its shard is corrupt), so this rank must print it;
    other errors are the same on all ranks and rank 0 speaks for them.
    """

    exit_code = 2
    every_rank = False


class ConfigError(UserError):
    """A key or value of the config."""


class DataError(UserError):
    """A dataset that is missing, damaged or not the one that the config describes."""

    every_rank = True


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another run."""

    every_rank = True


class NoValidCheckpoint(CheckpointError):
    """A run folder holds checkpoints and none of them verifies: a person must look; to start again would lose the run."""

    exit_code = 65  # EX_DATAERR of sysexits.h
