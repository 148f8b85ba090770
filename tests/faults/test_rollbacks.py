"""Rollbacks on two ranks: too many bad steps return training to a checkpoint and skip data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nextpt.checkpoint.folders import checkpoint_folders
from nextpt.checkpoint.manifest import read_manifest
from nextpt.checkpoint.selection import open_checkpoint
from nextpt.job.exit_record import read_exit_record
from tests.support.guard_jobs import Jobs

# Optimizer steps 7, 8 and 9; the checkpoint before them is that of step 6
NAN = [["nan", step, 1] for step in (6, 7, 8)]


def section(
    log_every: int = 1, steps: int = 14, every: int | None = 2, **guard: Any
) -> dict[str, Any]:
    return {
        "train": {"zero_stage": 2, "precision": "bf16", "steps": steps, "log_every": log_every},
        "schedule": {"kind": "wsd", "warmup": 4},
        "checkpoint": {"every_steps": every, "keep_last": None},
        "guard": {"window": 4, "spike_sigma": None, "rollback_after": 3} | guard,
    }


@pytest.fixture(scope="module")
def rollbacks(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    jobs = Jobs(dataset, tmp_path_factory.mktemp("rollbacks"))
    jobs.add("never", sections=section(), never=[6, 7, 8])
    jobs.add("whole", sections=section(), faults=NAN)
    jobs.add("seldom", sections=section(log_every=7), faults=NAN)
    background = section()
    background["checkpoint"] |= {"asynchronous": True}
    jobs.add("background", sections=background, faults=NAN)
    # "batches" is asked once a step: 9 is the last bad one, 10 the first after the rollback. Saves
    # are of steps 2, 4, 6, then 6 again.
    for name, event in {
        "between": ["batches", 9, "term"],
        "going": ["rollback", 1, "die"],
        "saving": ["fragments", 4, "die"],
        "after": ["batches", 10, "die"],
        "tripped": ["batches", 10, "term"],
    }.items():
        # With rare polls the signal arrives after the guard tripped and before the rollback.
        seldom = {"log_every": 5, "every": 6} if name == "tripped" else {}
        jobs.add(f"{name} ends", run=name, sections=section(**seldom), faults=NAN, events=[event])
        jobs.add(name, sections=section(), faults=NAN)
    for stage in (0, 3):
        other = section(steps=10) | {
            "train": {"zero_stage": stage, "precision": "fp32", "steps": 10, "log_every": 1}
        }
        jobs.add(f"whole {stage}", sections=other, faults=NAN)
        jobs.add(f"never {stage}", sections=other, never=[6, 7, 8])
        # Step 7, which is good, lies between the checkpoint and the first bad step
        jobs.add(f"again {stage}", sections=other, faults=[["nan", n, 0] for n in (7, 8, 9)])
        jobs.add(f"never again {stage}", sections=other, never=[6, 7, 8, 9])
    muon = section() | {"optimizer": {"kind": "muon", "lr": 1e-3, "muon": {"normuon_beta": 0.9}}}
    jobs.add("whole muon", sections=muon, faults=NAN)
    jobs.add("never muon", sections=muon, never=[6, 7, 8])
    jobs.add(
        "twice", sections=section(), faults=[*NAN, ["nan", 9, 0], ["nan", 10, 0], ["nan", 11, 0]]
    )
    jobs.add("twice never", sections=section(), never=[6, 7, 8, 9, 10, 11])
    jobs.add(
        "endless",
        sections=section(max_rollbacks=2),
        faults=[["nan", step, 0] for step in range(6, 60)],
    )
    jobs.add("nowhere", sections=section(every=None), faults=NAN)
    jobs.run()
    return jobs


KILLED = ("between", "going", "saving", "after", "tripped")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whole", "seldom", "background", *KILLED])
def test_a_rollback_skips_the_data_whenever_it_is_noticed_or_killed(
    rollbacks: Jobs, name: str
) -> None:
    """The weights also show that the learning rate is that of the step."""
    assert rollbacks.outcome(name) == ["finished", "", 0]
    states = {
        run: open_checkpoint(rollbacks.root / run / "checkpoints")
        for run in ("never", "whole", name)
    }
    for parameter in states["never"].shapes():
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            assert (
                states["never"]
                .read_whole(parameter, kind)
                .equal(states[name].read_whole(parameter, kind))
            ), (parameter, kind)
    assert states[name].state["guard"] == states["whole"].state["guard"]
    assert states[name].state["guard"]["accepted"] == states["never"].state["guard"]["accepted"]
    assert states[name].state["data"] == states["whole"].state["data"]
    assert (
        states[name].state["data"]["skipped"] == [[48, 72]]
        and states[name].state["data"]["position"] == (14 + 3) * 8
    )
    losses = rollbacks.losses(name)
    assert (
        losses == {step: loss for step, loss in rollbacks.losses("never").items() if step in losses}
        and max(losses) == 14
    )


@pytest.mark.slow
def test_the_kills_happened_at_the_planned_moments(rollbacks: Jobs) -> None:
    outcomes = {name: rollbacks.outcome(f"{name} ends") for name in KILLED}
    assert {name: outcome[0] for name, outcome in outcomes.items()} == {
        "between": "TrainingStopped",
        "going": "Killed",
        "saving": "Killed",
        "after": "Killed",
        "tripped": "TrainingStopped",
    }
    assert (
        "after step 8 (saved)" in outcomes["between"][1]
        and "after step 9 (saved)" in outcomes["tripped"][1]
    )


@pytest.mark.slow
def test_what_a_rollback_leaves_behind(rollbacks: Jobs) -> None:
    [event] = rollbacks.events("whole", "rollback")
    assert {
        k: event[k]
        for k in (
            "step",
            "first_bad",
            "last_bad",
            "reason",
            "first_sequence",
            "stop_sequence",
            "rollbacks",
        )
    } == {
        "step": 6,
        "first_bad": 7,
        "last_bad": 9,
        "reason": "loss not finite",
        "first_sequence": 48,
        "stop_sequence": 72,
        "rollbacks": 1,
    }
    assert rollbacks.events("whole", "skip") == []  # of repeated steps
    assert sorted(rollbacks.losses("whole")) == list(range(1, 15))
    manifests = {
        f.name: read_manifest(f)
        for f in checkpoint_folders(rollbacks.root / "whole" / "checkpoints")
    }
    order = sorted(manifests, key=lambda name: manifests[name].sequence)
    assert [name.removeprefix("step-").lstrip("0") for name in order] == [
        "2",
        "4",
        "6",
        "6.2",
        "8",
        "10",
        "12",
        "14",
    ]
    assert manifests[order[3]].lineage == [[1, 4]] and manifests[order[3]].step == 6
    text = (rollbacks.root / "logs" / "rank-0.log").read_text()
    assert "step 7 skipped: loss not finite (loss nan, grad norm inf" in text
    assert (
        "rolled back to step 6 after bad steps 7 to 9 (loss not finite); sequences 48 to 71 are"
        " skipped" in text
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_other_zero_stages_roll_back_as_well(rollbacks: Jobs, stage: int) -> None:
    assert (
        rollbacks.losses(f"whole {stage}") == rollbacks.losses(f"never {stage}")
        and len(rollbacks.losses(f"whole {stage}")) == 10
    )
    assert len(rollbacks.events(f"whole {stage}", "rollback")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_good_steps_before_the_bad_ones_are_rolled_back_as_well(
    rollbacks: Jobs, stage: int
) -> None:
    [event] = rollbacks.events(f"again {stage}", "rollback")
    assert (event["step"], event["first_bad"]) == (6, 8)
    assert rollbacks.losses(f"again {stage}") == rollbacks.losses(f"never again {stage}")


@pytest.mark.slow
def test_muon_rolls_back_as_well(rollbacks: Jobs) -> None:
    assert rollbacks.losses("whole muon") == rollbacks.losses("never muon")
    assert len(rollbacks.events("whole muon", "rollback")) == 1
    whole, never = (
        open_checkpoint(rollbacks.root / f"{part} muon" / "checkpoints")
        for part in ("whole", "never")
    )
    for parameter, kinds in never.state_shapes().items():
        for kind in kinds:
            read = whole.read_whole(parameter, kind)
            assert read.equal(never.read_whole(parameter, kind)), (parameter, kind)


@pytest.mark.slow
def test_bad_data_after_a_rollback_is_skipped_as_well(rollbacks: Jobs) -> None:
    assert rollbacks.losses("twice") == rollbacks.losses("twice never")
    state = open_checkpoint(rollbacks.root / "twice" / "checkpoints").state
    assert state["data"]["skipped"] == [[48, 96]] and (
        state["guard"]["skipped"],
        state["guard"]["rollbacks"],
    ) == (6, 0)
    assert [e["rollbacks"] for e in rollbacks.events("twice", "rollback")] == [1, 2]


@pytest.mark.slow
def test_too_many_rollbacks_end_with_a_one_line_error(rollbacks: Jobs) -> None:
    kind, message, code = rollbacks.outcome("endless")
    assert (kind, code) == ("UserError", 2) and read_exit_record(rollbacks.root / "endless")[
        "code"
    ] == 2
    assert message.startswith(
        "3 bad steps in a row, 7 to 9 (the last one: loss not finite), after 2 rollbacks to step 6"
        " (guard.max_rollbacks); "
    )
    assert [e["stop_sequence"] for e in rollbacks.events("endless", "rollback")] == [72, 96]
    kind, message, code = rollbacks.outcome("nowhere")
    assert (kind, code) == (
        "UserError",
        2,
    ) and "and there is no checkpoint from before them to roll back to; " in message
    assert not (rollbacks.root / "nowhere" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("point", "call"), [("fragments", 4), ("batches", 10)])
def test_a_rank_killed_inside_a_rollback_or_after_it(
    dataset: Path, tmp_path: Path, point: str, call: int
) -> None:
    """A real SIGKILL; the other rank ends by itself, and the next start continues identically."""
    jobs = [Jobs(dataset, tmp_path / part) for part in ("first", "second")]
    for probe in jobs:
        probe.root.mkdir()
    run = str(tmp_path / "run")
    jobs[0].add("run", run=run, sections=section(), faults=NAN, events=[[point, call, "kill"]])
    with pytest.raises(AssertionError, match="ranks ended with"):
        jobs[0].run()
    names = [f.name for f in checkpoint_folders(tmp_path / "run" / "checkpoints")]
    assert ("step-000000006.2" in names) == (point == "batches") and "step-000000008" not in names
    jobs[1].add("run", run=run, sections=section(), faults=NAN)
    jobs[1].add("never", sections=section(), never=[6, 7, 8])
    jobs[1].run()
    assert jobs[1].outcome("run") == ["finished", "", 0] and jobs[1].losses(run) == jobs[1].losses(
        "never"
    )
    assert open_checkpoint(tmp_path / "run" / "checkpoints").state["data"]["skipped"] == [[48, 72]]
