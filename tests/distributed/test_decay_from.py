"""Decays that begin at a checkpoint of a stable run: several lengths from one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nextpt.checkpoint.selection import open_checkpoint
from nextpt.config import Config, load_config
from nextpt.events import read_events
from tests.support.datasets import tiny
from tests.support.ranks import train_all

pytestmark = pytest.mark.process

FROM, DECAY = 4, 3
SAVES = {"every_steps": 2, "keep_last": None}
WSD = {"kind": "wsd", "warmup": 2, "final_ratio": 0.0}


def job(dataset: Path, folder: Path, train: dict[str, Any], schedule: dict[str, Any]) -> Config:
    return tiny(
        dataset,
        folder,
        run={"name": folder.name, "dir": str(folder)},
        train=train,
        schedule=WSD | schedule,
        checkpoint=SAVES,
    )


def decay(dataset: Path, root: Path, name: str, at_step: int = FROM, **train: Any) -> Config:
    source = {"run": str(root / "stable"), "at_step": at_step}
    train = {"steps": None, "decay_from": source} | train
    return job(dataset, root / name, train, {"decay": DECAY})


@pytest.fixture(scope="module")
def root(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("decay")
    stable = job(dataset, root / "stable", {"steps": 10}, {"decay": 2})
    whole = job(dataset, root / "whole", {"steps": FROM + DECAY}, {"decay": DECAY})
    other = tiny(
        dataset,
        root / "other",
        train={"steps": None, "decay_from": {"run": str(root / "stable"), "at_step": FROM}},
        schedule=WSD | {"decay": DECAY},
        optimizer={"lr": 1e-3},
        checkpoint=SAVES,
    )
    configs = [
        stable,
        whole,
        decay(dataset, root, "decay", stop_at=FROM + 1),
        decay(dataset, root, "decay"),
        decay(dataset, root, "late", at_step=10),
        decay(dataset, root, "missing", at_step=5),
        other,
    ]
    (root / "outcomes.txt").write_text(
        "\n".join(str(message) for message in train_all(configs, 2, root / "ranks"))
    )
    return root


def outcomes(root: Path) -> list[str]:
    return (root / "outcomes.txt").read_text().splitlines()


def test_a_decay_is_the_end_of_the_run_that_was_planned_so(root: Path) -> None:
    assert outcomes(root)[:4] == ["None"] * 4
    whole, decayed = (
        {e["step"]: e for e in read_events(root / name / "metrics.jsonl", "train")}
        for name in ("whole", "decay")
    )
    assert list(decayed) == [5, 6, 7] and decayed[7]["lr"] == pytest.approx(3e-3 / (DECAY + 1))
    for step, event in decayed.items():
        for key in ("loss", "lr", "tokens", "grad_norm"):
            assert event[key] == whole[step][key]
    ends = [open_checkpoint(root / name / "checkpoints") for name in ("whole", "decay")]
    for name, kinds in ends[0].state_shapes().items():
        for kind in kinds:
            assert torch.equal(*(end.read_whole(name, kind) for end in ends)), (name, kind)


def test_its_folder_stands_alone(root: Path) -> None:
    assert open_checkpoint(root / "decay" / "checkpoints", FROM).step == FROM
    assert load_config(root / "decay" / "config.yaml").total_steps == FROM + DECAY


def test_refusals_name_the_key(root: Path) -> None:
    late, missing, other = outcomes(root)[4:]
    assert "train.decay_from.at_step = 10" in late and "its own decay had begun" in late
    assert "train.decay_from.at_step = 5" in missing and "10, 8, 6, 4, 2" in missing
    assert "optimizer.lr: 0.003 -> 0.001" in other
