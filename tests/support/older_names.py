"""Datasets and unfinished preparations in the names that they had before format version 3."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

NAMES = {"validation_fraction": "heldout_fraction", "sequences": "rows"}
SPLITS = {"train": "train", "validation": "heldout"}


def dataset_of_version_2(folder: Path) -> Path:
    """Rename the folders and fields of a dataset in place."""
    path = folder / "dataset.json"
    manifest = renamed(json.loads(path.read_text())) | {"format_version": 2}
    path.write_text(json.dumps(manifest))
    os.rename(folder / "validation", folder / "heldout")
    os.rename(folder / "validation_text", folder / "heldout_text")
    return folder


def work_of_version_2(work: Path) -> Path:
    """Rename the files and fields of a preparation whose groups are packed, in place."""
    plan = json.loads((work / "plan.json").read_text())
    plan["spec"]["heldout"] = plan["spec"].pop("validation_fraction")
    (work / "plan.json").write_text(json.dumps(plan))
    for path in (work / "tok").glob("*.validation.jsonl"):
        os.rename(path, path.with_name(path.name.replace(".validation.", ".heldout.")))
    for path in (work / "packed").glob("*.json"):
        path.write_text(json.dumps(renamed(json.loads(path.read_text()))))
    os.rename(work / "dataset" / "validation", work / "dataset" / "heldout")
    return work


def renamed(value: Any) -> Any:
    """The value with the old names of keys, at every depth."""
    if not isinstance(value, dict):
        return value
    return {(NAMES | SPLITS).get(key, key): renamed(item) for key, item in value.items()}
