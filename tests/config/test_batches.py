"""Batch schedule: what any number of steps consumes, against a sum over the steps."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from nextpt.config import BatchSchedule

lengths = st.integers(1, 64)
sizes = st.integers(1, 40)


@st.composite
def schedules(draw: st.DrawFn) -> BatchSchedule:
    gaps = draw(st.lists(st.integers(1, 12), max_size=5))
    firsts = [sum(gaps[:n]) for n in range(len(gaps) + 1)]
    return BatchSchedule(draw(lengths), tuple((first, draw(sizes)) for first in firsts))


def batch_sizes(schedule: BatchSchedule, steps: int) -> list[int]:
    """The batch of each step, by looking every change up."""
    return [max(c for c in schedule.changes if c[0] <= step)[1] for step in range(steps)]


@settings(deadline=None)
@given(schedules(), st.integers(0, 90))
def test_consumed_is_the_sum_of_the_batches(schedule: BatchSchedule, step: int) -> None:
    batches = batch_sizes(schedule, step + 1)
    assert schedule.batch_size(step) == batches[-1]
    assert schedule.consumed(step) == sum(batches[:-1])
    assert schedule.consumed_tokens(step) == schedule.consumed(step) * schedule.sequence_length


@settings(deadline=None)
@given(schedules(), st.integers(0, 90), st.integers(0, 2000))
def test_steps_for_is_the_inverse(schedule: BatchSchedule, step: int, sequences: int) -> None:
    assert schedule.steps_for(schedule.consumed(step)) == step
    steps = schedule.steps_for(sequences)
    assert schedule.consumed(steps) >= sequences
    assert steps == 0 or schedule.consumed(steps - 1) < sequences
    tokens = schedule.consumed_tokens(step)
    assert schedule.steps_for_tokens(tokens) == step
    assert schedule.steps_for_tokens(tokens + 1) == step + 1


@settings(deadline=None)
@given(schedules(), st.integers(1, 80))
def test_phases_tile_the_steps(schedule: BatchSchedule, steps: int) -> None:
    phases = schedule.phases(steps)
    sizes_by_step = [size for first, last, size in phases for _ in range(first, last)]
    assert sizes_by_step == batch_sizes(schedule, steps)
    assert all(size % schedule.common_divisor == 0 for size in sizes_by_step)


@settings(deadline=None)
@given(schedules(), st.integers(1, 80), sizes)
def test_a_change_keeps_what_is_before_it(schedule: BatchSchedule, step: int, size: int) -> None:
    changed = schedule.with_change(step, size)
    assert batch_sizes(changed, step) == batch_sizes(schedule, step)
    assert changed.batch_size(step) == changed.batch_size(step + 50) == size
    assert changed.consumed(step + 3) == schedule.consumed(step) + 3 * size
