"""Errors of the checkpoint room: damaged folders, unsupported formats, failures all ranks share."""

from __future__ import annotations

from nextpt.base.errors import CheckpointError


class DamagedError(Exception):
    """Why a folder is not a valid checkpoint, as a phrase that follows its name."""


class UnsupportedVersionError(Exception):
    """A checkpoint of a format that this nextpt does not read. It may be valid."""


def same_on_all_ranks(
    message: str, kind: type[CheckpointError] = CheckpointError
) -> CheckpointError:
    """An error that all ranks raise alike, so that only rank 0 prints it."""
    error = kind(message)
    error.every_rank = False
    return error
