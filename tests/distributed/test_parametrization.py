"""Training under CompleteP: every ZeRO stage on two ranks follows one rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from nextpt.checkpoint.selection import open_checkpoint
from nextpt.config import Config
from nextpt.events import read_events
from tests.support.datasets import tiny
from tests.support.ranks import train_all

pytestmark = pytest.mark.process

MODEL = {"parametrization": "completep", "base_width": 8, "base_depth": 1}
# An epsilon that is not negligible, so that one of another group would show
OPTIMIZERS = {
    "adamw": {"eps": 1e-3},
    "muon": {"eps": 1e-3, "kind": "muon", "muon": {"scale": "match_rms_adamw"}},
}


def job(dataset: Path, folder: Path, optimizer: str, stage: int) -> Config:
    return tiny(
        dataset,
        folder,
        model=MODEL,
        optimizer=OPTIMIZERS[optimizer],
        train={"zero_stage": stage},
    )


@pytest.fixture(scope="module")
def root(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parametrization")
    jobs = {
        ranks: [
            job(dataset, root / f"{optimizer}-{ranks}-{stage}", optimizer, stage)
            for optimizer in OPTIMIZERS
            for stage in stages
        ]
        for ranks, stages in ((1, (0,)), (2, (1, 2, 3)))
    }
    for ranks, configs in jobs.items():
        assert train_all(configs, ranks, root / f"ranks-{ranks}") == [None] * len(configs)
    return root


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_ranks_follow_one(root: Path, optimizer: str, stage: int) -> None:
    runs = [root / f"{optimizer}-2-{stage}", root / f"{optimizer}-1-0"]
    curves, ratios = [], []
    for run in runs:
        events = read_events(run / "metrics.jsonl", "train")
        curves.append([event["loss"] for event in events])
        ratios.append([sorted(event["update_ratios"].items()) for event in events])
    assert curves[0] == pytest.approx(curves[1], rel=2e-5)
    for step, expected in zip(*ratios, strict=True):
        assert dict(step) == pytest.approx(dict(expected), rel=1e-2)
    ours, theirs = (open_checkpoint(run / "checkpoints") for run in runs)
    for name in ours.shapes():
        assert ours.read_whole(name).numpy() == pytest.approx(
            theirs.read_whole(name).numpy(), abs=1e-5
        ), name
