"""hpZ changes where weights are gathered from and no loss: validation, averages, a resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from nextpt.config import Config
from nextpt.events import read_events
from tests.support.datasets import tiny
from tests.support.ranks import train_all

pytestmark = pytest.mark.slow


def test_losses_and_resume_are_those_without_it(dataset: Path, tmp_path: Path) -> None:
    def config(run: str, hpz: int | None, averages: bool = False, **train: int) -> Config:
        return tiny(
            dataset,
            tmp_path / run,
            model={"width": 384},
            train={"steps": 8, "zero_stage": 3, "hpz_ranks": hpz, "micro_batch_size": 1}
            | {"ema": 0.9}
            | train,
            validation={"every_steps": 2, "sequences": 8, "averages": averages},
            checkpoint={"every_steps": 2},
        )

    def metrics(run: str) -> list[tuple[int, float]]:
        events = read_events(tmp_path / run / "metrics.jsonl")
        return [(e["step"], e["loss"]) for e in events if e["kind"] == "train"] + [
            (e["step"], e["total"]["nats_per_token"]) for e in events if e["kind"] == "validation"
        ]

    def averages(run: str) -> list[dict[str, float]]:
        events = read_events(tmp_path / run / "metrics.jsonl", "validation")
        return [e["averages"]["ema-0.9"]["total"] for e in events]

    # A process can have one engine with hpZ: DeepSpeed keeps its groups for good.
    for number, job in enumerate(
        (
            config("plain", None, averages=True),
            config("hpz", 2, stop_at=4),
            config("hpz", 2),
            config("hpz-averages", 2, averages=True),
        )
    ):
        assert train_all([job], 4, tmp_path / f"logs-{number}") == [None]
    assert len(metrics("plain")) == 12
    assert sorted(metrics("hpz")) == sorted(metrics("plain"))
    assert metrics("hpz-averages") == metrics("plain")
    assert len(averages("plain")) == 4 and averages("hpz-averages") == averages("plain")
