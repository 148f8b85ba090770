"""Batch growth: when noise estimates double the batch; and which steps can be compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from nextpt.base.collective import RankGroup
from nextpt.config import BatchSchedule, Config, parse_config
from nextpt.events import BatchEvent, Event, EventBus
from nextpt.train.batch_growth import BatchGrowth
from nextpt.train.loop import Trainer

LENGTH = 10


@dataclass
class Batches:
    """What batch growth sees of a loader."""

    batches: BatchSchedule = field(default_factory=lambda: BatchSchedule(LENGTH, ((0, 4),)))
    last_step: int = 100

    def change_batch(self, step: int, batch_size: int) -> None:
        self.batches = self.batches.with_change(step, batch_size)

    def begins_stage(self, step: int) -> bool:
        return step == 50


@dataclass
class Events:
    received: list[Event] = field(default_factory=list)

    def on_event(self, event: Event) -> None:
        self.received.append(event)

    def close(self) -> None:
        pass


def run(**growth: Any) -> Config:
    return parse_config(
        {
            "run": {"name": "t"},
            "data": {"path": "d", "sequence_length": LENGTH},
            "model": {"vocab_size": 8, "depth": 1, "width": 8, "heads": 1},
            "optimizer": {"lr": 2.0},
            "train": {
                "steps": 100,
                "global_batch_size": 4,
                "micro_batch_size": 2,
                "batch_growth": {"max_batch_size": 16, "measured_steps": 3} | growth,
            },
            "checkpoint": {"every_steps": 5},
        },
        "test",
    )


def open_growth(**growth: Any) -> tuple[BatchGrowth, Batches, Events]:
    batches, events = Batches(), Events()
    loader: Any = batches
    decisions = BatchGrowth(run(**growth), loader, RankGroup.world(), EventBus([events]))
    return decisions, batches, events


def measure(growth: BatchGrowth, scale: float, times: int = 3) -> None:
    for _ in range(times):
        growth.record(10, {"trace": 2 * scale, "square": 2.0})
        growth.record(11, {"trace": 1e9, "square": 1.0})  # logged because training stops there
        growth.record(20, None)


def test_two_comparisons_in_a_row_double_the_batch() -> None:
    growth, loader, events = open_growth()
    for step, scale in ((5, 41.0), (10, 39.0), (15, 41.0), (20, 45.0)):
        measure(growth, scale)
        growth.decide(step)
    assert loader.batches.changes == ((0, 4), (20, 8))
    [event] = events.received
    assert isinstance(event, BatchEvent)
    assert (event.step, event.batch_size, event.noise_scale) == (20, 8, pytest.approx(45.0))
    for step in (25, 30, 35, 40):
        measure(growth, 1e6)
        growth.decide(step)
    assert loader.batches.changes == ((0, 4), (20, 8), (30, 16))


def test_decisions_wait_for_a_checkpoint_and_enough_estimates() -> None:
    growth, loader, _ = open_growth()
    measure(growth, 1e6, 2)
    growth.decide(5)  # two of three estimates
    measure(growth, 1e6, 1)
    growth.decide(7)  # no checkpoint of checkpoint.every_steps
    assert growth.state() == {"trace": 6e6, "square": 6.0, "count": 3, "above": 0}
    growth.decide(10)
    assert growth.state() == {"trace": 0.0, "square": 0.0, "count": 0, "above": 1}
    other, others, _ = open_growth()
    other.load_state(growth.state())
    for resumed in (growth, other):
        measure(resumed, 1e6)
        resumed.decide(15)
    assert loader.batches == others.batches == BatchSchedule(LENGTH, ((0, 4), (15, 8)))


def test_noise_without_a_gradient_decides_nothing() -> None:
    growth, loader, _ = open_growth()
    for step in (5, 10):
        for _ in range(3):
            growth.record(10, {"trace": 5.0, "square": -1.0})
        growth.decide(step)
    assert loader.batches.changes == ((0, 4),)


def test_a_smaller_batch_starts_the_spike_statistics_anew() -> None:
    schedule = BatchSchedule(LENGTH, ((0, 4), (10, 8), (20, 2)))
    trainer: Any = SimpleNamespace(context=SimpleNamespace(loader=Batches(schedule)))
    kept = [step for step in range(60) if Trainer._is_comparable(trainer, step)]
    assert sorted(set(range(60)) - set(kept)) == [20, 50]
