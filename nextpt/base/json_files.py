"""JSON files: canonical and durable when written, parsed strictly when read."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from nextpt.base.files import canonical_json


def write_json(path: Path, value: Any) -> None:
    """Write canonical JSON and sync it to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(canonical_json(value))
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Make the bytes of a file, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_regular(path: Path, *, follow_links: bool = False) -> BinaryIO:
    """Open a regular file for reading, never through a symbolic link unless that is allowed.

    Raises:
        OSError: Also for a symbolic link, a pipe, a device or a folder.
    """
    if path.is_symlink() and not follow_links:  # for the message; the flag keeps the promise
        raise OSError(f"{path.name} is a symbolic link")
    # A pipe must not make it wait
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    handle = os.open(path, flags if follow_links else flags | os.O_NOFOLLOW)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(f"{path.name} is not a plain file")
    return os.fdopen(handle, "rb")


def read_json(path: Path) -> Any:
    """Read a JSON file that may have been written by anyone.

    Raises:
        OSError: When it cannot be read or is not a regular file.
        ValueError: When it holds what canonical JSON never does.
    """
    with open_regular(path) as file:
        return parse_json(file.read())


def parse_json(data: bytes) -> Any:
    """Parse strict JSON: UTF-8, finite numbers, no duplicate key, no excessive nesting.

    Raises:
        ValueError: When the data is anything else.
    """
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} comes twice")
    return unique


def _refuse(text: str) -> float:
    raise ValueError(f"the number {text} is not finite")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)
