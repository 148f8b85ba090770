"""Signals, lost folders and crashes at chosen moments: start, validation, inside a save."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nextpt.checkpoint.folders import steps
from nextpt.config import to_yaml
from nextpt.events import read_events
from nextpt.job.exit_record import read_exit_record
from tests.support.datasets import tiny
from tests.support.ranks import run_ranks

CASES = {
    "starting": {},
    "validating": {"validation": {"every_steps": 2, "sequences": 8}},
    "saving": {"checkpoint": {"every_steps": 2}},
    "crashing": {},
    "taken": {"checkpoint": {"every_steps": 2}},
    "finishing": {},
}


@pytest.fixture(scope="module")
def root(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("moments")
    arguments = []
    for name, sections in CASES.items():
        (root / f"{name}.yaml").write_text(to_yaml(tiny(dataset, root / name, **sections)))
        arguments.append(f"{name}={root / name}.yaml")
    run_ranks(
        ["-m", "tests.support.job_probe", str(root / "out.json"), *arguments], 1, root / "logs"
    )
    return root


def outcome(root: Path, name: str) -> tuple[str, str, int]:
    return tuple(json.loads((root / "out.json").read_text())[name])


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "step", "text"),
    [
        ("starting", 0, "nothing to save yet"),
        ("validating", 2, "saved"),
        ("saving", 2, "saved"),
    ],
)
def test_a_signal_stops_training_at_the_next_step(
    root: Path, name: str, step: int, text: str
) -> None:
    kind, message, code = outcome(root, name)
    assert (kind, code) == ("TrainingStopped", 75) and f"after step {step} ({text})" in message, (
        message
    )
    assert steps(root / name / "checkpoints") == [step] * (step > 0)
    assert (
        read_exit_record(root / name)["code"] == 75
        and read_exit_record(root / name)["step"] == step
    )
    assert read_events(root / name / "metrics.jsonl", "validation") == []
    assert len(read_events(root / name / "metrics.jsonl", "checkpoint")) == (step > 0)  # not twice


@pytest.mark.process
def test_a_job_that_lost_its_folder_commits_nothing_and_leaves_the_record_to_the_other(
    root: Path,
) -> None:
    kind, message, code = outcome(root, "taken")
    assert "was taken over by process 7 on elsewhere" in message and code == 4, (
        kind,
        message,
        code,
    )
    assert steps(root / "taken" / "checkpoints") == [] and read_exit_record(root / "taken") is None


@pytest.mark.process
def test_a_crash_is_recorded_with_the_last_step(root: Path) -> None:
    assert outcome(root, "crashing") == ("RuntimeError", "the third batch", 1)
    assert read_exit_record(root / "crashing") | {"time": 0, "host": 0} == {
        "code": 1,
        "reason": "RuntimeError: the third batch",
        "step": 2,
        "time": 0,
        "host": 0,
    }


@pytest.mark.process
def test_a_signal_after_the_end_changes_nothing(root: Path) -> None:
    assert (
        outcome(root, "finishing")[0] == "finished"
        and read_exit_record(root / "finishing")["code"] == 0
    )
