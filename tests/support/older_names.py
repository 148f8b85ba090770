"""Datasets and unfinished preparations in the names that they had before format version 3."""

from __future__ import annotations

import json
import os
import struct
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
    layout = json.loads((work / "layout.json").read_text())
    layout["counts"]["passed"] = layout["counts"].pop("filtered")
    (work / "layout.json").write_text(json.dumps(layout))
    for path in (work / "tok").glob("*.bad.jsonl"):
        path.write_text(path.read_text().replace('"position":', '"place":'))
    for path in (work / "tok").glob("*.tok"):
        data = path.read_bytes()
        start = len(data) - 16 - struct.unpack("<Q", data[-16:-8])[0]
        footer = json.loads(data[start:-16])
        footer["passed"] = footer.pop("filtered")
        encoded = json.dumps(footer).encode()
        path.write_bytes(data[:start] + encoded + struct.pack("<Q", len(encoded)) + data[-8:])
    for path in (work / "packed").glob("*.json"):
        path.write_text(json.dumps(renamed(json.loads(path.read_text()))))
    os.rename(work / "dataset" / "validation", work / "dataset" / "heldout")
    return work


def renamed(value: Any) -> Any:
    """The value with the old names of keys, at every depth."""
    if not isinstance(value, dict):
        return value
    return {(NAMES | SPLITS).get(key, key): renamed(item) for key, item in value.items()}
