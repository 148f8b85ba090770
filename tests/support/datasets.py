"""Small datasets and configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.prepare import prepare
from data_prep.spec import PrepSpec
from data_prep.stdlib_corpus import collect
from nextpt.config import Config, parse_config


def make_dataset(
    library: Path, folder: Path, sequence_length: int = 64, vocab_size: int = 512
) -> Path:
    """Collect and prepare the sources in `library`; returns the dataset folder."""
    collect(folder / "corpus", library)
    domains = {name: folder / "corpus" / f"{name}.jsonl" for name in ("code", "prose")}
    prepare(
        PrepSpec(
            domains=domains,
            output=folder / "shards",
            sequence_length=sequence_length,
            vocab_size=vocab_size,
            validation_fraction=0.2,
        )
    )
    return folder / "shards"


def tiny(dataset: Path, folder: Path, **overrides: Any) -> Config:
    """A config that trains in a second. overrides: section=dict."""
    values: dict[str, Any] = {
        "run": {"name": "tiny", "dir": str(folder)},
        "data": {"path": str(dataset), "sequence_length": 64},
        "model": {
            "vocab_size": 512,
            "depth": 2,
            "width": 32,
            "heads": 4,
            "kv_heads": 2,
            "qk_norm": True,
        },
        "optimizer": {"lr": 3e-3},
        "schedule": {"kind": "wsd", "warmup": 2},
        "train": {
            "steps": 6,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "precision": "fp32",
            "log_every": 1,
        },
    }
    for section, changes in overrides.items():
        values[section] = values.get(section, {}) | changes
    return parse_config(values, "test")
