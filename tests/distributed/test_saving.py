"""Checkpoints of real jobs on two gloo ranks: background saves, rollback, retention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nextpt.checkpoint.folders import checkpoint_folders
from nextpt.checkpoint.manifest import read_manifest
from nextpt.checkpoint.selection import open_checkpoint
from nextpt.events import read_events
from tests.support.datasets import tiny
from tests.support.ranks import train_all

pytestmark = pytest.mark.process

STEPS = 6


@pytest.fixture(scope="module")
def jobs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saving")

    def job(name: str, train: dict[str, object] | None = None, **checkpoint: object) -> object:
        return tiny(
            dataset,
            root / name,
            train={"steps": STEPS, "zero_stage": 2} | (train or {}),
            validation={"every_steps": 2, "sequences": 8},
            checkpoint={"every_steps": 1, "keep_last": 2, "keep_best": 1} | checkpoint,
        )

    configs = [
        job("plain"),
        job("background", asynchronous=True),
        job("rolled back", {"stop_at": 4}, keep_last=None),
        job("rolled back", {"stop_at": 3}, keep_last=None, resume=2),
        job("rolled back", keep_last=None, asynchronous=True),
    ]
    assert train_all(configs, 2, root / "logs") == [None] * len(configs)
    return root


def state(run: Path) -> dict[tuple[str, str], torch.Tensor]:
    checkpoint = open_checkpoint(run / "checkpoints")
    assert checkpoint.step == STEPS
    return {
        (name, kind): checkpoint.read_whole(name, kind)
        for name, kinds in checkpoint.state_shapes().items()
        for kind in kinds
    }


@pytest.mark.parametrize("name", ["background", "rolled back"])
def test_no_bit_differs(jobs: Path, name: str) -> None:
    losses = [
        [event["loss"] for event in read_events(jobs / run / "metrics.jsonl", "train")]
        for run in ("plain", name)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS
    expected, actual = state(jobs / "plain"), state(jobs / name)
    assert [key for key in expected if not torch.equal(expected[key], actual[key])] == []


def test_every_save_is_reported_once_in_order(jobs: Path) -> None:
    for run in ("plain", "background"):
        events = read_events(jobs / run / "metrics.jsonl", "checkpoint")
        assert [event["step"] for event in events] == list(range(1, STEPS + 1))
        assert all(
            event["stall_seconds"] > 0 and event["seconds"] > 0 and event["bytes"] > 10**5
            for event in events
        )


def test_the_best_is_kept_by_the_validation_of_its_step(jobs: Path) -> None:
    for run in ("plain", "background"):
        losses = {
            e["step"]: e["total"]["nats_per_token"]
            for e in read_events(jobs / run / "metrics.jsonl", "validation")
        }
        best = min(losses, key=losses.get)
        manifests = {
            m.step: m for m in map(read_manifest, checkpoint_folders(jobs / run / "checkpoints"))
        }
        assert manifests.keys() == {STEPS - 1, STEPS, best}
        assert manifests[STEPS - 1].loss == losses[4] and manifests[STEPS].loss == losses[6]


def test_a_rollback_continues_its_lineage(jobs: Path) -> None:
    """The lineage has the step 3 saved after the rollback, not the abandoned steps 3 and 4."""
    manifests = {
        f.name[13:]: read_manifest(f)
        for f in checkpoint_folders(jobs / "rolled back" / "checkpoints")
    }
    assert {name: m.sequence for name, m in manifests.items()} == {
        "1": 1,
        "2": 2,
        "3": 3,
        "4": 4,
        "3.2": 5,
        "4.2": 6,
        "5": 7,
        "6": 8,
    }
    assert manifests["6"].lineage == [[1, 2], [5, 8]] and manifests["4"].lineage == [[1, 4]]


def test_the_state_records_how_the_job_was_started(jobs: Path) -> None:
    record = open_checkpoint(jobs / "plain" / "checkpoints").state
    assert record["tokens"] == STEPS * 8 * 64 and record["validation"]["step"] == STEPS
    assert (
        record["start"]["world_size"] == 2
        and sum(record["start"]["devices"].values()) == 2
        and "commit" in record["start"]
    )
    assert {"python", "torch", "deepspeed"} <= record["versions"].keys()
