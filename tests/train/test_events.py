"""Events: delivery by the bus, and metrics.jsonl as it is written and was written."""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from nextpt.base.errors import DataError, UserError
from nextpt.events import (
    Event,
    EventBus,
    MetricsFile,
    RollbackEvent,
    SaveFailedEvent,
    StepEvent,
    ValidationEvent,
    read_events,
    scalars,
)
from tests.support.file_operations import full_disk


class Recorder:
    """Appends what it receives to a shared list."""

    def __init__(self, name: str, notes: list[tuple[str, str]]) -> None:
        self.name, self.notes = name, notes

    def on_event(self, event: Event) -> None:
        self.notes.append((self.name, event.kind))

    def close(self) -> None:
        self.notes.append((self.name, "closed"))


def step_event(step: int) -> StepEvent:
    return StepEvent(step, step * 10, 1.0, 0.5, 1e-3, 2.0, 100.0, auxiliary_losses={"router": 0.25})


def test_a_bus_delivers_in_the_order_of_subscription_and_closes_all() -> None:
    notes: list[tuple[str, str]] = []
    events = EventBus([Recorder("first", notes)])
    events.publish(step_event(1))
    events.subscribe(Recorder("second", notes))
    events.publish(SaveFailedEvent(1, "full", 0, 28, 1))
    events.close()
    assert notes == [
        ("first", "train"),
        ("first", "save_failed"),
        ("second", "save_failed"),
        ("first", "closed"),
        ("second", "closed"),
    ]


def test_auxiliary_losses_are_scalars_of_their_own() -> None:
    assert scalars(step_event(1))["train/auxiliary_losses/router"] == 0.25


def test_a_rollback_removes_later_records_and_a_resume_too(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0)
    for step in range(1, 6):
        metrics.on_event(step_event(step))
    metrics.on_event(RollbackEvent(3, 4, 5, "loss spike", 24, 40, 1))
    assert [(e["kind"], e["step"]) for e in read_events(path)][2:] == [
        ("train", 3),
        ("rollback", 3),
    ]
    MetricsFile(path, 2)
    assert [e["step"] for e in read_events(path)] == [1, 2]


def test_records_with_the_keys_before_2026_12_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    skip = {"kind": "skip", "step": 7, "reason": "loss spike", "loss": 9.0, "grad_norm": 2.0}
    skip |= {"skipped": 3}
    rollback = {
        "kind": "rollback",
        "step": 6,
        "first_bad": 7,
        "last_bad": 8,
        "reason": "loss spike",
    }
    rollback |= {"rollbacks": 1}
    validation = {"kind": "validation", "step": 8, "tokens": 80, "domains": {}}
    nats = {"nats_per_token": 3.0}
    old = [
        skip | {"in_row": 2},
        rollback | {"first_sample": 48, "stop_sample": 72},
        {"kind": "mirror", "step": 6, "status": "passed over"},
        validation | {"total": nats | {"bpb_text": 1.5, "bpb_code": 1.75}},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in old) + '{"kind": "tr')
    assert read_events(path) == [
        skip | {"consecutive": 2},
        rollback | {"first_sequence": 48, "stop_sequence": 72},
        {"kind": "mirror", "step": 6, "status": "skipped"},
        validation | {"total": nats | {"bpb": 1.5, "bpb_with_eod": 1.75}},
    ]


def line_of(event: Event, **changes: object) -> bytes:
    return json.dumps(asdict(event) | changes).encode()


VALIDATION = ValidationEvent(2, 20, {}, {"nats_per_token": 1.0, "bpb": 0.5})
DAMAGED_LINES = [
    b'{"kind": "train", "step": 2, "loss": \xff}',
    b'{"kind": "train", "step": Infinity}',
    b"[" * 200_000,
    b'{"a":' * 100_000,
    b"null",
    b"[]",
    b'"step"',
    b"\0\0\0\0",
    b'{"kind": "train", "step": 1e400}',
    b'{"kind": "train", "step": ' + b"9" * 5000 + b"}",
    line_of(step_event(2), step=True),
    line_of(step_event(2), step=-2),
    line_of(step_event(2), step=2**70),
    line_of(step_event(2), kind=None),
    line_of(step_event(2), loss="low"),
    line_of(step_event(2), tokens_per_second=0.0),
    line_of(step_event(2), domains={"code": {"nats_per_token": 1.0, "bpc": 2.0}}),
    line_of(step_event(2)).replace(b'"loss"', b'"losr"'),
    line_of(VALIDATION, averages={"ema-0.9": {"domains": {}}}),
    line_of(VALIDATION, averages={"ema-0.9": {"domains": {}, "total": {"bpb": 1.0}}}),
]


@pytest.mark.parametrize("line", DAMAGED_LINES, ids=lambda line: repr(line[:40]))
def test_a_damaged_line_is_skipped_and_reported_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes
) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [line_of(step_event(1)), line, line_of(step_event(3)), b'{"kind": "tr']
    path.write_bytes(b"\n".join(lines))
    assert [event["step"] for event in read_events(path, "train")] == [1, 3]
    assert not read_events(path, "batch")
    MetricsFile(path, 3).on_event(step_event(4))
    assert path.read_bytes().splitlines()[:2] == [lines[0], lines[2]]
    assert [event["step"] for event in read_events(path)] == [1, 3, 4]
    assert capsys.readouterr().err == f"warning: {path} has 1 damaged line; skipped\n"


def test_losses_that_are_not_finite_are_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    values = (math.nan, math.inf)
    path.write_bytes(b"".join(line_of(step_event(1), loss=v, grad_norm=v) + b"\n" for v in values))
    assert len(read_events(path)) == 2


def test_a_file_that_is_none_is_a_user_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, problem in (("pipe", "not a plain file"), ("", "not a plain file")):
        with pytest.raises(DataError, match=problem):
            read_events(tmp_path / name)
    assert read_events(tmp_path / "none") == []


def test_a_planted_link_is_not_written_through(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / "metrics.jsonl.tmp").symlink_to(target)
    MetricsFile(tmp_path / "metrics.jsonl", 0).on_event(step_event(1))
    assert target.read_text() == "mine"


def test_records_that_a_full_disk_refused_are_written_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0, max_failures=2)
    for step in (1, 2, 3):
        metrics.on_event(step_event(step))
    with full_disk():
        for step in range(4, 40):
            metrics.on_event(step_event(step))
        metrics.on_event(SaveFailedEvent(39, "full", 0, errno.ENOSPC, 1))
        metrics.on_event(RollbackEvent(6, 7, 9, "loss spike", 24, 40, 1))
        metrics.on_event(step_event(7))
    assert [event["step"] for event in read_events(path)] == [1, 2, 3]
    metrics.on_event(step_event(8))
    assert [(e["kind"], e["step"]) for e in read_events(path)] == [
        *(("train", step) for step in range(1, 7)),
        ("rollback", 6),
        ("train", 7),
        ("train", 8),
    ]
    assert capsys.readouterr().err == (
        f"warning: {path} cannot be written: File too large; its records are kept and written"
        " later, training goes on (see checkpoint.on_failure)\n"
    )


def test_a_disk_that_refuses_for_several_saves_ends_training(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0, max_failures=2)
    strict = MetricsFile(tmp_path / "strict.jsonl", 0)
    failed = SaveFailedEvent(3, "full", 0, errno.ENOSPC, 1)
    with full_disk():
        metrics.on_event(failed)
        metrics.on_event(step_event(4))
        with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: File too large"):
            metrics.on_event(failed)
        with pytest.raises(UserError, match=r"strict\.jsonl cannot be written"):
            strict.on_event(step_event(1))
        metrics.close()


def test_half_a_record_of_a_failed_write_is_removed(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0, max_failures=2)
    metrics.on_event(step_event(1))
    size = metrics.path.stat().st_size
    with full_disk(size + 10):
        metrics.on_event(step_event(2))
    assert metrics.path.stat().st_size == size + 10
    metrics.on_event(step_event(3))
    lines = metrics.path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_records_of_a_job_that_took_over_are_kept(tmp_path: Path) -> None:
    """A job that was suspended learns of it at its next step, after its next event."""
    suspended = MetricsFile(tmp_path / "metrics.jsonl", 0)
    suspended.on_event(step_event(1))
    MetricsFile(tmp_path / "metrics.jsonl", 1).on_event(step_event(2))
    suspended.on_event(step_event(2))
    assert [event["step"] for event in read_events(suspended.path)] == [1, 2, 2]
