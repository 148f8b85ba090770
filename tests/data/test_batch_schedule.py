"""Data order under a batch schedule: numbered by consumption, whatever the number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nextpt.base.errors import DataError
from nextpt.data.loader import Loader
from tests.support.datasets import tiny

SCHEDULE = [
    {"after_steps": 2, "global_batch_size": 12},
    {"after_steps": 4, "global_batch_size": 24},
]


def open_loader(dataset: Path, rank: int = 0, world: int = 1, **train: Any) -> Loader:
    defaults = {"global_batch_size": 6, "micro_batch_size": 2, "batch_schedule": SCHEDULE}
    return Loader(tiny(dataset, Path("unused"), train=defaults | train), rank, world)


@pytest.mark.parametrize("world", [1, 3])
def test_ranks_divide_the_consumed_sequences(dataset: Path, world: int) -> None:
    loaders = [open_loader(dataset, rank, world) for rank in range(world)]
    for step, first, stop in ((0, 0, 6), (1, 6, 12), (2, 12, 24), (3, 24, 36), (4, 36, 60)):
        positions = [loader.positions(step) for loader in loaders]
        assert {len(ranges) for ranges in positions} == {(stop - first) // (2 * world)}
        in_order = [p for ranges in zip(*positions, strict=True) for r in ranges for p in r]
        assert in_order == list(range(first, stop))
        assert len(loaders[0].step_batches(step)) == len(positions[0])


def test_only_the_past_of_the_schedule_is_fixed(dataset: Path) -> None:
    state = open_loader(dataset).state(3)
    assert state["position"] == 24
    later = [SCHEDULE[0], {"after_steps": 3, "global_batch_size": 18}]
    for schedule in (SCHEDULE[:1], later):
        open_loader(dataset, batch_schedule=schedule).check_state(state)
    earlier = [{"after_steps": 1, "global_batch_size": 12}]
    for schedule in (None, earlier):
        with pytest.raises(DataError, match=r"before step 3 \(train.batch_schedule"):
            open_loader(dataset, batch_schedule=schedule).check_state(state)
    constant = open_loader(dataset, batch_schedule=None)
    old = {name: value for name, value in constant.state(3).items() if name != "batches"}
    constant.check_state(old)
    with pytest.raises(DataError, match=r"before step 3 \(train.batch_schedule"):
        open_loader(dataset).check_state(old)


def test_decisions_are_part_of_the_state(dataset: Path) -> None:
    growth = {"max_batch_size": 24}
    grown = tiny(
        dataset,
        Path("unused"),
        schedule={"unit": "tokens"},
        train={"steps": None, "tokens": 64 * 60, "global_batch_size": 6, "batch_growth": growth},
        checkpoint={"every_steps": 1},
    )
    loader = Loader(grown, 0, 1)
    assert loader.last_step == 10
    loader.change_batch(4, 12)
    assert loader.last_step == 7
    other = Loader(grown, 0, 1)
    state = loader.state(4)
    other.check_state(state)
    other.load_state(state)
    assert other.batches == loader.batches and other.state(4) == state
