"""A second optimizer, with other kinds of state: training, resuming, other ranks and stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.optimizer_jobs import Jobs

pytestmark = pytest.mark.process

STEPS = 6
STAGES = range(4)
RUNS = [*(("fp32", stage) for stage in STAGES), *(("bf16", stage) for stage in (1, 2, 3))]
# (ranks, ZeRO stage) of the steps up to each of 2, 4, 5 and 6
CHAIN = [(2, 1), (1, 3), (3, 2), (2, 0)]


@pytest.fixture(scope="module")
def jobs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    jobs = Jobs(dataset, tmp_path_factory.mktemp("sign-momentum"), STEPS)
    work: list[dict[str, Any]] = []
    for precision, stage in RUNS:
        name, train = f"{precision}-{stage}", {"precision": precision, "zero_stage": stage}
        work.append({"train": jobs.write(f"whole-{name}", train=train)})
        for stop in (3, STEPS):
            work.append({"train": jobs.write(f"halves-{name}", train=train | {"stop_at": stop})})
    work.append({"train": jobs.write("adamw", train={"stop_at": 2}), "kind": "adamw"})
    assert jobs.run(work, 2) == [None] * len(work)
    return jobs


@pytest.mark.parametrize(("precision", "stage"), RUNS)
def test_resuming_changes_no_bit(jobs: Jobs, precision: str, stage: int) -> None:
    losses = jobs.losses(f"whole-{precision}-{stage}")
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.1
    assert jobs.losses(f"halves-{precision}-{stage}") == losses
    whole, halves = (jobs.state(f"{part}-{precision}-{stage}") for part in ("whole", "halves"))
    assert whole.keys() == halves.keys()
    assert [key for key in whole if not torch.equal(whole[key], halves[key])] == []


@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_hold_the_kinds_of_the_spec(jobs: Jobs, stage: int) -> None:
    state = jobs.state(f"whole-fp32-{stage}")
    weights = {name: value for (name, kind), value in state.items() if kind == "weight"}
    momenta = {name: value for (name, kind), value in state.items() if kind == "momentum"}
    ages = {name: value for (name, kind), value in state.items() if kind == "age"}
    assert len(state) == len(weights) + len(momenta) + len(ages)
    assert ages.keys() == momenta.keys() == {n for n, w in weights.items() if w.dim() >= 2}
    assert all(age.shape == () and age == STEPS for age in ages.values())
    assert all(momenta[n].shape == weights[n].shape and momenta[n].any() for n in momenta)
    assert jobs.losses(f"whole-fp32-{stage}") == pytest.approx(
        jobs.losses("whole-fp32-0"), rel=1e-4
    )


def test_ranks_and_stage_may_change(jobs: Jobs) -> None:
    stops = [2, 4, 5, STEPS]
    for stop, (ranks, stage) in zip(stops, CHAIN, strict=True):
        train = {"zero_stage": stage, "stop_at": stop}
        assert jobs.run([{"train": jobs.write("chain", train=train)}], ranks) == [None]
    assert jobs.losses("chain") == pytest.approx(jobs.losses("whole-fp32-1"), rel=1e-4)
    assert jobs.losses("chain")[:2] == jobs.losses("whole-fp32-1")[:2]


@pytest.mark.parametrize("ranks", [1, 3])
def test_other_layouts_load_the_same_state(jobs: Jobs, ranks: int) -> None:
    """A state that other ranks load at any stage is saved again unchanged."""
    work = [
        {
            "reload": jobs.write("whole-fp32-2", train={"zero_stage": stage}),
            "to": str(jobs.root / f"reloaded-{ranks}-{stage}" / "checkpoints"),
        }
        for stage in STAGES
    ]
    jobs.run(work, ranks)
    expected = jobs.state("whole-fp32-2")
    for stage in STAGES:
        state = jobs.state(f"reloaded-{ranks}-{stage}")
        assert state.keys() == expected.keys()
        assert [key for key in state if not torch.equal(state[key], expected[key])] == []


def test_a_bad_step_changes_nothing(jobs: Jobs) -> None:
    small = {"vocab_size": 64, "width": 32, "heads": 2, "kv_heads": 1}
    batch = {"micro_batch_size": 2, "global_batch_size": 16}
    work = [
        {
            "bad step": jobs.write(
                "bad",
                model=small,
                data={"sequence_length": 16},
                train=batch | {"zero_stage": stage},
            )
        }
        for stage in STAGES
    ]
    for result in jobs.run(work, 2):
        assert [bool(reason) for reason in result["reasons"]] == [False, True, False]
        for good, bad, next_good in result["digests"]:
            assert good == bad != next_good
        assert all(0 < ratio < 1 for ratio in result["ratios"][0].values())


def test_a_run_keeps_its_optimizer(jobs: Jobs) -> None:
    [message] = jobs.run([{"train": jobs.write("adamw")}], 1)
    assert "optimizer.kind: adamw -> sign_momentum" in message
