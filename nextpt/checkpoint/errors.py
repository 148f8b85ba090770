"""Errors of the checkpoint room: damaged folders, unsupported formats."""

from __future__ import annotations


class DamagedError(Exception):
    """Why a folder is not a valid checkpoint, as a phrase that follows its name."""


class UnsupportedVersionError(Exception):
    """A checkpoint of a format that this nextpt does not read. It may be valid."""
