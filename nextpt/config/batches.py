"""Batch schedule: sequences per optimizer step, and what any number of steps consumes.

Data order, learning-rate schedules, logs, plans, resuming and token accounting all count with
`BatchSchedule.consumed` and its inverse, so they agree while the batch size changes.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSchedule:
    """Batch size as a function of the step, in exact integers.

    Attributes:
        sequence_length: Tokens of a sequence.
        changes: (completed steps, batch size of the steps after them) in rising order; the first
            is of step 0. Batch sizes are sequences over all ranks.
    """

    sequence_length: int
    changes: tuple[tuple[int, int], ...]

    def phases(self, steps: int) -> list[tuple[int, int, int]]:
        """(first completed steps, last, batch size) of each part of the first `steps` steps."""
        return [
            (first, min(self._end(number, steps), steps), size)
            for number, (first, size) in enumerate(self.changes)
            if first < steps
        ]

    def batch_size(self, step: int) -> int:
        """Sequences of the optimizer step that is made after `step` completed steps."""
        return self.changes[self._phase(step)][1]

    def consumed(self, step: int) -> int:
        """Sequences that the first `step` steps consume: piecewise linear, from 0."""
        return sum(size * (last - first) for first, last, size in self.phases(step))

    def consumed_tokens(self, step: int) -> int:
        """Tokens that the first `step` steps consume."""
        return self.consumed(step) * self.sequence_length

    def steps_for(self, sequences: int) -> int:
        """Smallest number of steps that consumes at least `sequences` sequences.

        The inverse of `consumed`: steps_for(consumed(n)) = n.
        """
        number = bisect.bisect_left(
            range(1, len(self.changes)), sequences, key=lambda n: self.consumed(self.changes[n][0])
        )
        first, size = self.changes[number]
        return first + -(-(sequences - self.consumed(first)) // size)

    def steps_for_tokens(self, tokens: int) -> int:
        """Smallest number of steps that consumes at least `tokens` tokens."""
        return self.steps_for(-(-tokens // self.sequence_length))

    @property
    def common_divisor(self) -> int:
        """Greatest common divisor of all batch sizes, sequences."""
        return math.gcd(*(size for _, size in self.changes))

    def with_change(self, step: int, batch_size: int) -> BatchSchedule:
        """This schedule until `step` completed steps, and another batch size after them."""
        before = tuple(change for change in self.changes if change[0] < step)
        return BatchSchedule(self.sequence_length, (*before, (step, batch_size)))

    def _phase(self, step: int) -> int:
        """Index of the change whose batch size the step at index `step` has."""
        return bisect.bisect_right(self.changes, step, key=lambda change: change[0]) - 1

    def _end(self, number: int, step: int) -> int:
        return self.changes[number + 1][0] if number + 1 < len(self.changes) else step
