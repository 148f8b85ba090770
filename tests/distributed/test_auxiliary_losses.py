"""A model's auxiliary losses reach the gradient and the log, at any ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nextpt.config import to_yaml
from nextpt.events import read_events
from tests.support.datasets import tiny
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.process


@pytest.mark.parametrize("stage", [1, 3])
def test_auxiliary_losses_reach_the_gradient_and_the_log(
    stage: int, dataset: Path, tmp_path: Path
) -> None:
    config = tiny(
        dataset,
        tmp_path / "run",
        train={"steps": 3, "zero_stage": stage},
        objective={"z_loss_coefficient": 1e-3},
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    out = tmp_path / "step.json"
    arguments = ["-m", "tests.support.auxiliary_probe", str(tmp_path / "config.yaml"), str(out)]
    run_ranks(arguments, 2, tmp_path / "ranks")
    step = json.loads(out.read_text())
    for name in ("loss", "activation", "norm"):
        assert step[name] == pytest.approx(step[f"expected_{name}"], rel=1e-4), name
    events = read_events(tmp_path / "run" / "metrics.jsonl", "train")
    assert [set(event["auxiliary_losses"]) for event in events] == [{"activation"}] * 3
    # RMSNorm with unit weights makes the mean square of its output 1 before training
    assert events[0]["auxiliary_losses"]["activation"] == pytest.approx(1.0, rel=0.05)
    assert events[0]["loss"] == pytest.approx(6.24, abs=0.1)  # ln 512 and no part of the auxiliary
