"""JSON files: written canonical and durable, read as if an enemy had written them."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from nextpt.base.files import canonical_json


def write_json(path: Path, value: Any) -> None:
    """Canonical JSON, synced to the disk."""
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


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read; never through a symbolic link, and never one that is no plain file.

    Raises OSError.
    """
    if path.is_symlink():  # for the message; the flag below is what keeps the promise
        raise OSError(f"{path.name} is a symbolic link")
    # A pipe must not make it wait
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(f"{path.name} is not a plain file")
    return os.fdopen(handle, "rb")


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises OSError, or ValueError for what canonical JSON never holds.
    """
    with open_regular(path) as file:
        return parse_json(file.read())


def parse_json(data: bytes) -> Any:
    """Strict JSON: UTF-8, finite numbers, no key twice, and no nesting that exhausts the stack.

    Raises ValueError.
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
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} comes twice")
    return found


def _refuse(text: str) -> float:
    raise ValueError(f"the number {text} is not finite")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)
