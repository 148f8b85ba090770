"""Bad steps on two ranks: NaN, infinities and spikes are skipped and leave no trace."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest

from nextpt.checkpoint.selection import open_checkpoint
from tests.support.guard_jobs import Jobs

STAGES = (0, 1, 2, 3)
# data step -> (what happens to it, on which rank; null: all); a data step is the optimizer step
# before one.
FAULTS = {
    6: ("nan", 1),
    8: ("inf", 0),
    10: ("gradient nan", 1),
    12: ("gradient", None),
    14: ("loss", 0),
}
REASONS = {
    7: "loss not finite",
    9: "loss not finite",
    11: "gradient not finite",
    13: "gradient spike",
    15: "loss spike",
}
STEPS = 16


@pytest.fixture(scope="module")
def quick(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """The faults of all kinds, an end between two bad steps, and a rollback.

    The slow tests check each kind by itself.
    """
    jobs = Jobs(dataset, tmp_path_factory.mktemp("quick"))
    train = {"zero_stage": 3, "precision": "bf16", "log_every": 1}
    sections = {
        "guard": {"window": 6, "spike_sigma": 6.0, "rollback_after": 3},
        "checkpoint": {"every_steps": 5, "keep_last": None},
    }
    faults = [
        *([kind, step, rank] for step, (kind, rank) in FAULTS.items()),
        *(["nan", step, 0] for step in (16, 17, 18)),
    ]
    whole, fewer = (sections | {"train": train | {"steps": steps}} for steps in (20, 15))
    jobs.add(
        "bad ends",
        run="bad",
        sections=whole,
        faults=faults,
        digests=True,
        events=[["batches", 19, "term"]],
    )
    jobs.add("bad", sections=whole, faults=faults, digests=True)
    jobs.add("never", sections=fewer, never=[*FAULTS, 16, 17, 18], digests=True)
    jobs.run()
    return jobs


@pytest.mark.process
def test_bad_steps_leave_no_trace_and_too_many_in_a_row_are_rolled_back(quick: Jobs) -> None:
    assert "stopped by SIGTERM after step 18 (saved)" in quick.outcome("bad ends")[1]
    assert quick.outcome("bad") == quick.outcome("never") == ["finished", "", 0]
    for outcomes in quick.outcomes:
        digests = outcomes["bad ends"]["digests"][:18] + outcomes["bad"]["digests"]
        assert [number for number, _ in digests] == [*range(1, 20), *range(17, 21)]
        same = [after[0] for before, after in pairwise(digests) if before[1] == after[1]]
        assert same == [*REASONS, 17, 18, 19]
        assert digests[-1][1] == outcomes["never"]["digests"][-1][1]
    assert {e["step"]: e["reason"] for e in quick.events("bad", "skip")} == REASONS
    bad, never = quick.losses("bad"), quick.losses("never")
    assert [loss for step, loss in bad.items() if step not in REASONS] == list(
        never.values()
    ) and max(bad) == 20


@pytest.mark.process
def test_bad_steps_are_counted_across_a_restart(quick: Jobs) -> None:
    # Step 15 was bad, so the checkpoint is of step 16
    [event] = quick.events("bad", "rollback")
    assert (
        event["step"],
        event["first_bad"],
        event["last_bad"],
        event["first_sequence"],
        event["stop_sequence"],
    ) == (16, 17, 19, 128, 152)
    state = open_checkpoint(quick.root / "bad" / "checkpoints").state
    assert (
        state["guard"]["skipped"] == 8
        and state["data"]["skipped"] == [[128, 152]]
        and state["data"]["position"] == 23 * 8
    )
    assert (
        state["guard"]["accepted"]
        == open_checkpoint(quick.root / "never" / "checkpoints").state["guard"]["accepted"]
    )


@pytest.fixture(scope="module")
def skips(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Per stage a job with faults, and one without those batches."""
    jobs = Jobs(dataset, tmp_path_factory.mktemp("skips"))
    for stage in STAGES:
        train = {
            "zero_stage": stage,
            "precision": "bf16" if stage else "fp32",
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "log_every": 1,
        }
        section = {"guard": {"window": 6, "spike_sigma": 6.0}}
        jobs.add(
            f"bad {stage}",
            sections=section | {"train": train | {"steps": STEPS}},
            digests=True,
            faults=[[kind, step, rank] for step, (kind, rank) in FAULTS.items()],
        )
        jobs.add(
            f"never {stage}",
            sections=section | {"train": train | {"steps": STEPS - len(FAULTS)}},
            digests=True,
            never=list(FAULTS),
        )
    train = {"zero_stage": 1, "precision": "bf16"}
    jobs.add("differs", sections=section | {"train": train | {"steps": 8}}, differs=1)
    stages = {
        "data": {"stages": [{"steps": 6, "mixing": {"code": 1.0}}, {"mixing": {"prose": 1.0}}]}
    }
    jobs.add("stages", sections=stages | {"guard": {"window": 8}, "train": train | {"steps": 9}})
    jobs.add(
        "stages ends",
        run="stages resumed",
        sections=stages | {"guard": {"window": 8}, "train": train | {"steps": 9, "stop_at": 6}},
    )
    jobs.add(
        "stages resumed", sections=stages | {"guard": {"window": 8}, "train": train | {"steps": 9}}
    )
    for stage, precision in ((2, "fp32"), (3, "bf16")):
        train = {"zero_stage": stage, "precision": precision, "steps": 4}
        jobs.add(
            f"host checks {stage}",
            sections={"train": train},
            faults=[["nan", 2, 1]],
            **{"host checks": True},
        )
    jobs.run()
    return jobs


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_bad_step_changes_no_bit_of_weights_moments_and_working_weights(
    skips: Jobs, stage: int
) -> None:
    assert skips.outcome(f"bad {stage}") == ["finished", "", 0]
    for outcomes in skips.outcomes:
        digests = dict(outcomes[f"bad {stage}"]["digests"])
        assert digests.keys() == set(range(1, STEPS + 1))
        assert {
            step for step in range(2, STEPS + 1) if digests[step] == digests[step - 1]
        } == REASONS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_every_skip_is_published_with_its_reason(skips: Jobs, stage: int) -> None:
    events = skips.events(f"bad {stage}", "skip")
    assert {e["step"]: e["reason"] for e in events} == REASONS
    assert [(e["consecutive"], e["skipped"]) for e in events] == [(1, n) for n in range(1, 6)]
    train = {e["step"]: e for e in skips.events(f"bad {stage}", "train")}
    assert (
        train.keys() == set(range(1, STEPS + 1))
        and repr(train[7]["loss"]) == repr(events[0]["loss"]) == "nan"
    )
    assert all(
        math.isfinite(train[n]["loss"]) and math.isfinite(train[n]["bpb"])
        for n in train
        if n not in (7, 9)
    )
    spike, gradient = events[4], events[3]
    assert (
        spike["loss"] > spike["loss_limit"] + 2
        and gradient["grad_norm"] > gradient["grad_norm_limit"] > 0
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_training_equals_that_without_the_bad_batches(skips: Jobs, stage: int) -> None:
    bad, never = skips.losses(f"bad {stage}"), skips.losses(f"never {stage}")
    assert [loss for step, loss in bad.items() if step not in REASONS] == list(never.values())
    for outcomes in skips.outcomes:
        assert (
            outcomes[f"bad {stage}"]["digests"][-1][1]
            == outcomes[f"never {stage}"]["digests"][-1][1]
        )
    states = [
        open_checkpoint(skips.root / f"{name} {stage}" / "checkpoints").state["guard"]
        for name in ("bad", "never")
    ]
    assert states[0]["accepted"] == states[1]["accepted"] and len(states[0]["accepted"][0]) == 6
    assert (states[0]["skipped"], states[1]["skipped"]) == (5, 0)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_skip_by_deepspeed_itself_is_an_error(skips: Jobs, stage: int) -> None:
    kind, message, _ = skips.outcome(f"host checks {stage}")
    assert (
        kind == "RuntimeError"
        and "skipped an optimizer step by itself (engine.skipped_steps = 1,"
        " optimizer.overflow = True)"
        in message
    )


@pytest.mark.slow
def test_ranks_with_different_verdicts_are_named(skips: Jobs) -> None:
    kind, message, _ = skips.outcome("differs")
    assert (
        kind == "RuntimeError"
        and "differently: [skipped in all, in a row] is [[0, 0], [1, 1]], by rank" in message
    ), message


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stages", "stages resumed"])
def test_a_data_stage_is_not_compared_with_the_one_before(skips: Jobs, name: str) -> None:
    losses = skips.losses(name)
    state = open_checkpoint(skips.root / name / "checkpoints").state["guard"]
    assert state["accepted"][0] == pytest.approx([losses[step] for step in (7, 8, 9)], rel=1e-12)


@pytest.mark.slow
def test_healthy_training_skips_no_step(dataset: Path, tmp_path: Path) -> None:
    """Warm-up, a high learning rate, batches of 4 sequences, and a window that is soon full.

    At 1e-2 the gradient does spike, to three times its size, with the text of Python 3.11.2.
    """
    jobs = Jobs(dataset, tmp_path)
    sections = {
        "train": {"steps": 400, "global_batch_size": 4, "micro_batch_size": 2},
        "guard": {"window": 32},
        "optimizer": {"lr": 5e-3},
        "schedule": {"kind": "wsd", "warmup": 60},
    }
    jobs.add("run", sections=sections)
    jobs.run()
    assert jobs.outcome("run") == ["finished", "", 0] and jobs.events("run", "skip") == []
    losses = jobs.losses("run")
    assert losses[400] < losses[1] - 1
