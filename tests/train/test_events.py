"""Events: delivery by the bus, and metrics.jsonl as it is written and was written."""

from __future__ import annotations

import json
from pathlib import Path

from nextpt.events import (
    Event,
    EventBus,
    MetricsFile,
    RollbackEvent,
    SaveFailedEvent,
    StepEvent,
    read_events,
    scalars,
)


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
    old = [
        {"kind": "skip", "step": 7, "in_row": 2, "skipped": 3},
        {"kind": "rollback", "step": 6, "first_sample": 48, "stop_sample": 72},
        {"kind": "mirror", "step": 6, "status": "passed over"},
        {"kind": "validation", "step": 8, "total": {"bpb_text": 1.5, "bpb_code": 1.75}},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in old) + '{"kind": "tr')
    assert read_events(path) == [
        {"kind": "skip", "step": 7, "consecutive": 2, "skipped": 3},
        {"kind": "rollback", "step": 6, "first_sequence": 48, "stop_sequence": 72},
        {"kind": "mirror", "step": 6, "status": "skipped"},
        {"kind": "validation", "step": 8, "total": {"bpb": 1.5, "bpb_with_eod": 1.75}},
    ]
