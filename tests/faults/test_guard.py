"""NaN, infinities and spikes in real jobs on two ranks: a bad step leaves no trace, and too many are rolled back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from nextpt.checkpoint.commit import open_checkpoint
from nextpt.checkpoint.folders import checkpoint_folders
from nextpt.checkpoint.manifest import read_manifest
from nextpt.config import to_yaml
from nextpt.events import read_events
from nextpt.job.exit_record import read_exit_record
from tests.support.datasets import tiny
from tests.support.ranks import run_ranks

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


class Jobs:
    """Jobs of one pair of processes, written down and then run."""

    def __init__(self, dataset: Path, root: Path) -> None:
        self.dataset, self.root, self.jobs, self.names = dataset, root, [], []

    def add(
        self, name: str, run: str | None = None, sections: dict[str, Any] | None = None, **job: Any
    ) -> None:
        """A job of its own name, in the run folder of another where `run` is given."""
        sections = {"schedule": {"kind": "constant", "warmup": 0}, "optimizer": {"lr": 1e-3}} | (
            sections or {}
        )
        path = self.root / f"{len(self.jobs)}.yaml"
        path.write_text(to_yaml(tiny(self.dataset, self.root / (run or name), **sections)))
        self.jobs.append({"config": str(path)} | job)
        self.names.append(name)

    def run(self) -> None:
        (self.root / "jobs.json").write_text(json.dumps(self.jobs))
        run_ranks(
            [
                "-m",
                "tests.support.guard_probe",
                str(self.root / "jobs.json"),
                str(self.root / "out"),
            ],
            2,
            self.root / "logs",
        )
        self.found = [
            dict(
                zip(
                    self.names,
                    json.loads((self.root / f"out-{rank}.json").read_text()),
                    strict=True,
                )
            )
            for rank in range(2)
        ]

    def outcome(self, name: str) -> list[Any]:
        both = [found[name]["outcome"] for found in self.found]
        assert both[0][0] == both[1][0], both
        return both[0]

    def events(self, run: str, kind: str) -> list[dict[str, Any]]:
        return read_events(self.root / run / "metrics.jsonl", kind)

    def losses(self, run: str) -> dict[int, float]:
        events = self.events(run, "train")
        assert len({e["step"] for e in events}) == len(events)
        return {e["step"]: e["loss"] for e in events}


@pytest.fixture(scope="module")
def quick(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """The faults of all kinds, an end between two bad steps, and a rollback.

    What is slow looks at them one by one.
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


def test_bad_steps_leave_no_trace_and_too_many_in_a_row_are_passed_over(quick: Jobs) -> None:
    assert "stopped by SIGTERM after step 18 (saved)" in quick.outcome("bad ends")[1]
    assert quick.outcome("bad") == quick.outcome("never") == ["finished", "", 0]
    for found in quick.found:
        digests = found["bad ends"]["digests"][:18] + found["bad"]["digests"]
        assert [number for number, _ in digests] == [*range(1, 20), *range(17, 21)]
        same = [
            after[0]
            for before, after in zip(digests, digests[1:], strict=False)
            if before[1] == after[1]
        ]
        assert same == [*REASONS, 17, 18, 19]
        assert digests[-1][1] == found["never"]["digests"][-1][1]
    assert {e["step"]: e["reason"] for e in quick.events("bad", "skip")} == REASONS
    bad, never = quick.losses("bad"), quick.losses("never")
    assert [loss for step, loss in bad.items() if step not in REASONS] == list(
        never.values()
    ) and max(bad) == 20


def test_the_guard_goes_on_counting_after_an_end_between_bad_steps(quick: Jobs) -> None:
    # Step 15 was bad, so its checkpoint was made of step 16
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
    """Per stage a job with faults, and one that is never given those batches."""
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
    for found in skips.found:
        digests = dict(found[f"bad {stage}"]["digests"])
        assert digests.keys() == set(range(1, STEPS + 1))
        assert {
            step for step in range(2, STEPS + 1) if digests[step] == digests[step - 1]
        } == REASONS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_every_skip_is_told_with_its_reason(skips: Jobs, stage: int) -> None:
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
def test_training_is_that_in_which_the_bad_batches_never_came(skips: Jobs, stage: int) -> None:
    bad, never = skips.losses(f"bad {stage}"), skips.losses(f"never {stage}")
    assert [loss for step, loss in bad.items() if step not in REASONS] == list(never.values())
    for found in skips.found:
        assert found[f"bad {stage}"]["digests"][-1][1] == found[f"never {stage}"]["digests"][-1][1]
    states = [
        open_checkpoint(skips.root / f"{name} {stage}" / "checkpoints").state["guard"]
        for name in ("bad", "never")
    ]
    assert states[0]["accepted"] == states[1]["accepted"] and len(states[0]["accepted"][0]) == 6
    assert (states[0]["skipped"], states[1]["skipped"]) == (5, 0)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_skip_of_deepspeeds_own_is_an_error(skips: Jobs, stage: int) -> None:
    kind, message, _ = skips.outcome(f"host checks {stage}")
    assert (
        kind == "RuntimeError"
        and "skipped an optimizer step by itself (engine.skipped_steps = 1, optimizer.overflow = True)"
        in message
    )


@pytest.mark.slow
def test_ranks_that_judge_differently_are_told(skips: Jobs) -> None:
    kind, message, _ = skips.outcome("differs")
    assert (
        kind == "RuntimeError"
        and "differently: [skipped in all, in a row] is [[0, 0], [1, 1]], by rank" in message
    ), message


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stages", "stages resumed"])
def test_another_stage_is_not_compared_with_the_one_before(skips: Jobs, name: str) -> None:
    losses = skips.losses(name)
    state = open_checkpoint(skips.root / name / "checkpoints").state["guard"]
    assert state["accepted"][0] == pytest.approx([losses[step] for step in (7, 8, 9)], rel=1e-12)


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
        # Where one seldom looks the signal finds the guard tripped, and nothing yet done about it.
        seldom = {"log_every": 5, "every": 6} if name == "tripped" else {}
        jobs.add(f"{name} ends", run=name, sections=section(**seldom), faults=NAN, events=[event])
        jobs.add(name, sections=section(), faults=NAN)
    for stage in (0, 3):
        other = section(steps=10) | {
            "train": {"zero_stage": stage, "precision": "fp32", "steps": 10, "log_every": 1}
        }
        jobs.add(f"whole {stage}", sections=other, faults=NAN)
        jobs.add(f"never {stage}", sections=other, never=[6, 7, 8])
    jobs.add(
        "twice", sections=section(), faults=[*NAN, ["nan", 9, 0], ["nan", 10, 0], ["nan", 11, 0]]
    )
    jobs.add("twice never", sections=section(), never=[6, 7, 8, 9, 10, 11])
    jobs.add(
        "for ever",
        sections=section(max_rollbacks=2),
        faults=[["nan", step, 0] for step in range(6, 60)],
    )
    jobs.add("nowhere", sections=section(every=None), faults=NAN)
    jobs.run()
    return jobs


KILLED = ("between", "going", "saving", "after", "tripped")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whole", "seldom", "background", *KILLED])
def test_a_rollback_passes_over_the_data_wherever_it_is_looked_at_or_killed(
    rollbacks: Jobs, name: str
) -> None:
    """Also the learning rate is that of the step, for it is in the weights."""
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
def test_the_moments_of_death_are_those_that_were_meant(rollbacks: Jobs) -> None:
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
    assert rollbacks.events("whole", "skip") == []  # of steps that were made again
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
def test_other_stages_go_back_as_well(rollbacks: Jobs, stage: int) -> None:
    assert (
        rollbacks.losses(f"whole {stage}") == rollbacks.losses(f"never {stage}")
        and len(rollbacks.losses(f"whole {stage}")) == 10
    )
    assert len(rollbacks.events(f"whole {stage}", "rollback")) == 1


@pytest.mark.slow
def test_bad_data_after_a_rollback_is_passed_over_as_well(rollbacks: Jobs) -> None:
    assert rollbacks.losses("twice") == rollbacks.losses("twice never")
    state = open_checkpoint(rollbacks.root / "twice" / "checkpoints").state
    assert state["data"]["skipped"] == [[48, 96]] and (
        state["guard"]["skipped"],
        state["guard"]["rollbacks"],
    ) == (6, 0)
    assert [e["rollbacks"] for e in rollbacks.events("twice", "rollback")] == [1, 2]


@pytest.mark.slow
def test_it_gives_up_in_one_line(rollbacks: Jobs) -> None:
    kind, message, code = rollbacks.outcome("for ever")
    assert (kind, code) == ("UserError", 2) and read_exit_record(rollbacks.root / "for ever")[
        "code"
    ] == 2
    assert message.startswith(
        "3 bad steps in a row, 7 to 9 (the last one: loss not finite), after 2 rollbacks to step 6"
        " (guard.max_rollbacks); "
    )
    assert [e["stop_sequence"] for e in rollbacks.events("for ever", "rollback")] == [72, 96]
    kind, message, code = rollbacks.outcome("nowhere")
    assert (kind, code) == (
        "UserError",
        2,
    ) and "and there is no checkpoint from before them to go back to; " in message
    assert not (rollbacks.root / "nowhere" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("place", "call"), [("fragments", 4), ("batches", 10)])
def test_a_rank_killed_inside_a_rollback_or_after_it(
    dataset: Path, tmp_path: Path, place: str, call: int
) -> None:
    """A real SIGKILL; the other rank ends by itself, and both go on as if nothing had been."""
    jobs = [Jobs(dataset, tmp_path / part) for part in ("first", "second")]
    for one in jobs:
        one.root.mkdir()
    run = str(tmp_path / "run")
    jobs[0].add("run", run=run, sections=section(), faults=NAN, events=[[place, call, "kill"]])
    with pytest.raises(AssertionError, match="ranks ended with"):
        jobs[0].run()
    names = [f.name for f in checkpoint_folders(tmp_path / "run" / "checkpoints")]
    assert ("step-000000006.2" in names) == (place == "batches") and "step-000000008" not in names
    jobs[1].add("run", run=run, sections=section(), faults=NAN)
    jobs[1].add("never", sections=section(), never=[6, 7, 8])
    jobs[1].run()
    assert jobs[1].outcome("run") == ["finished", "", 0] and jobs[1].losses(run) == jobs[1].losses(
        "never"
    )
    assert open_checkpoint(tmp_path / "run" / "checkpoints").state["data"]["skipped"] == [[48, 72]]


@pytest.mark.slow
def test_healthy_training_is_never_interrupted(dataset: Path, tmp_path: Path) -> None:
    """Warm-up, a high learning rate, batches of 4 rows, and a window that is soon full."""
    jobs = Jobs(dataset, tmp_path)
    sections = {
        "train": {"steps": 400, "global_batch_size": 4, "micro_batch_size": 2},
        "guard": {"window": 32},
        "optimizer": {"lr": 1e-2},
        "schedule": {"kind": "wsd", "warmup": 60},
    }
    jobs.add("run", sections=sections)
    jobs.run()
    assert jobs.outcome("run") == ["finished", "", 0] and jobs.events("run", "skip") == []
    losses = jobs.losses("run")
    assert losses[400] < losses[1] - 1
