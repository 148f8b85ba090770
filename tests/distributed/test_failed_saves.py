"""Real jobs on two gloo ranks, where the disk of one refuses some saves."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from nextpt.checkpoint.folders import steps
from nextpt.checkpoint.selection import open_checkpoint
from nextpt.config import to_yaml
from nextpt.events import read_events
from tests.support.datasets import tiny
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow
STEPS = 6
TWO_AND_THREE = r"\.staging-step-00000000[23]/rank-00001"


@pytest.fixture(scope="module")
def jobs(
    dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str | None]]:
    """Folder of the runs, and how each of them ended, by name."""
    root = tmp_path_factory.mktemp("refusing")
    failures = {
        "plain": ("", 0, {}),
        "synchronous": (TWO_AND_THREE, errno.EDQUOT, {}),
        "background": (TWO_AND_THREE, errno.EIO, {"asynchronous": True}),
        "stop": (TWO_AND_THREE, errno.EIO, {"on_failure": "stop"}),
        "too many": (TWO_AND_THREE, errno.EIO, {"max_failures": 2}),
        "the last": (r"step-000000006/rank-00001", errno.ENOSPC, {}),
    }
    arguments = []
    for name, (pattern, number, checkpoint) in failures.items():
        config = tiny(
            dataset,
            root / name,
            train={"steps": STEPS, "zero_stage": 1},
            checkpoint={"every_steps": 1, "keep_last": None} | checkpoint,
        )
        (root / f"{name}.yaml").write_text(to_yaml(config))
        arguments += [pattern, str(number), str(root / f"{name}.yaml")]
    run_ranks(
        ["-m", "tests.support.disk_probe", str(root / "outcomes.json"), "1", *arguments],
        2,
        root / "logs",
    )
    return root, dict(zip(failures, json.loads((root / "outcomes.json").read_text()), strict=True))


def state(run: Path) -> dict[tuple[str, str], torch.Tensor]:
    checkpoint = open_checkpoint(run / "checkpoints")
    assert checkpoint.step == STEPS
    return {
        (name, kind): checkpoint.read_whole(name, kind)
        for name, kinds in checkpoint.state_shapes().items()
        for kind in kinds
    }


@pytest.mark.parametrize(
    ("name", "number"), [("synchronous", errno.EDQUOT), ("background", errno.EIO)]
)
def test_training_goes_on_untouched(
    jobs: tuple[Path, dict[str, str | None]], name: str, number: int
) -> None:
    root, ends = jobs
    assert ends[name] is None and steps(root / name / "checkpoints") == [6, 5, 4, 1]
    losses = [
        [e["loss"] for e in read_events(root / run / "metrics.jsonl", "train")]
        for run in ("plain", name)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS
    expected, actual = state(root / "plain"), state(root / name)
    assert [key for key in expected if not torch.equal(expected[key], actual[key])] == []
    events = read_events(root / name / "metrics.jsonl", "save_failed")
    assert [(e["step"], e["rank"], e["errno"], e["consecutive"]) for e in events] == [
        (2, 1, number, 1),
        (3, 1, number, 2),
    ]
    assert errno.errorcode[number] in events[0]["message"]
    assert (root / "logs" / "rank-0.log").read_text().count(
        f"warning: no checkpoint of step 2: saving to {root / name}/checkpoints failed on rank 1"
    ) == 1


@pytest.mark.parametrize(
    ("name", "remaining"), [("stop", [1]), ("too many", [1]), ("the last", [5, 4, 3, 2, 1])]
)
def test_training_ends_with_the_error_if_configured(
    jobs: tuple[Path, dict[str, str | None]], name: str, remaining: list[int]
) -> None:
    root, ends = jobs
    assert "failed on rank 1: " in ends[name] and steps(root / name / "checkpoints") == remaining
    assert not list((root / name / "checkpoints").glob(".*"))
