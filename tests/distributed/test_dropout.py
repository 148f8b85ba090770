"""Dropout on real ranks: the same losses for any layout, and through a resume to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nextpt.config import Config
from nextpt.events import read_events
from tests.support.datasets import tiny
from tests.support.ranks import train_all

pytestmark = pytest.mark.process

STEPS = 6


def job(dataset: Path, folder: Path, dropout: float = 0.2, **train: Any) -> Config:
    return tiny(
        dataset,
        folder,
        model={"dropout": dropout, "mtp_depth": 1},
        train={"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 4} | train,
    )


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in read_events(folder / "metrics.jsonl", "train")]


def test_losses_are_those_of_one_rank_and_of_an_unbroken_run(dataset: Path, tmp_path: Path) -> None:
    assert train_all(
        [
            job(dataset, tmp_path / "one", zero_stage=0),
            job(dataset, tmp_path / "none", dropout=0.0, zero_stage=0),
        ],
        1,
        tmp_path / "ranks-1",
    ) == [None, None]
    two = [
        job(dataset, tmp_path / "stage-1", zero_stage=1),
        job(dataset, tmp_path / "stage-3", zero_stage=3, micro_batch_size=2),
        job(dataset, tmp_path / "recomputed", zero_stage=2, activation_checkpointing=True),
        job(dataset, tmp_path / "stopped", zero_stage=1, stop_at=3),
        job(dataset, tmp_path / "stopped", zero_stage=1),
    ]
    assert train_all(two, 2, tmp_path / "ranks-2") == [None] * len(two)
    expected = losses(tmp_path / "one")
    assert len(expected) == STEPS
    assert losses(tmp_path / "none")[0] != pytest.approx(expected[0], rel=1e-4)
    for name in ("stage-1", "stage-3", "recomputed"):
        assert losses(tmp_path / name) == pytest.approx(expected, rel=2e-5)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "stage-1")


@pytest.mark.slow
def test_compiled_blocks_drop_the_same(dataset: Path, tmp_path: Path) -> None:
    runs = [
        job(dataset, tmp_path / str(compiled), zero_stage=0, compile=compiled)
        for compiled in (False, True)
    ]
    assert train_all(runs, 1, tmp_path / "ranks") == [None, None]
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-4)
