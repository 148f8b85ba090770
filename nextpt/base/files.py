"""Writing files so that they exist whole or not at all."""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_write(path: Path, mode: str = "w", *, keep_same: bool = False) -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`.

    It is synced and takes the name when the block ends without an error.

    keep_same: a file that holds the same bytes already is left as it is, with its time of
    modification.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not (keep_same and path.exists() and filecmp.cmp(temporary, path, shallow=False)):
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no insignificant choice, ending in a newline."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
