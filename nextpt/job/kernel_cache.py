"""Trials of kernels that are remembered from job to job, in a file of the user's cache folder."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import platformdirs

from nextpt.base.errors import print_notice
from nextpt.base.files import atomic_write, canonical_json
from nextpt.base.json_files import read_json

KEPT_ENTRIES = 200


def cache_file() -> Path:
    """The file, ~/.cache/nextpt/kernels.json on Linux."""
    return platformdirs.user_cache_path("nextpt") / "kernels.json"


def entry_key(facts: dict[str, Any]) -> str:
    """Key of an entry: a hash of what its trials depend on."""
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()[:16]


def read_entries(path: Path) -> dict[str, dict[str, Any]]:
    """Entries by key, oldest first; none where the file is missing, damaged or another's."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    entries = {key: entry for key, entry in content.items() if isinstance(entry, dict)}
    return {key: entries[key] for key in sorted(entries, key=lambda key: _time(entries[key]))}


def remember(path: Path, key: str, entry: dict[str, Any]) -> None:
    """Add an entry and drop the oldest beyond a bound; where the disk refuses, with a warning."""
    entries = read_entries(path)
    entries.pop(key, None)
    entries[key] = {**entry, "time": time.time()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(canonical_json(dict([*entries.items()][-KEPT_ENTRIES:])))
    except OSError as error:
        print_notice(f"warning: trials of kernels are not kept in {path}: {error}")


def _time(entry: dict[str, Any]) -> float:
    value = entry.get("time")
    return value if isinstance(value, float) else 0.0
