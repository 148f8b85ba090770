"""Batch growth: doubles the batch as the measured gradient noise scale grows (train.batch_growth).

The noise scale B_simple (arXiv 1812.06162; nextpt/train/dynamics.py) is a proxy of the critical
batch, above which larger batches save hardly any steps. It rises in training. Single estimates
scatter widely, so the ratio of two means over `measured_steps` logged steps is compared with the
batch, and two comparisons in a row must be above it.

Decisions are made at checkpoints of `checkpoint.every_steps` and are part of the state that is
saved there: a resumed run has the decisions of its past, and decides on from the same estimates.
"""

from __future__ import annotations

from typing import Any

from nextpt.base.collective import RankGroup
from nextpt.config import Config
from nextpt.data.loader import Loader
from nextpt.events import BatchEvent, EventBus
from nextpt.train.dynamics import noise_scale

FACTOR = 2  # an integer, so that what divides the first batch divides all
COMPARISONS = 2  # in a row above the batch

EMPTY_STATE: dict[str, Any] = {"trace": 0.0, "square": 0.0, "count": 0, "above": 0}


class BatchGrowth:
    """Collects noise estimates and decides when the batch doubles; idle without its section.

    Args:
        config: The run.
        loader: Its batches; their size is changed here.
        group: All ranks.
        events: Where decisions are published.
    """

    def __init__(self, config: Config, loader: Loader, group: RankGroup, events: EventBus) -> None:
        self.config, self.section = config, config.train.batch_growth
        self.loader, self.group, self.events = loader, group, events
        self.trace = self.square = 0.0
        self.count = self.above = 0

    def record(self, step: int, estimate: dict[str, float] | None) -> None:
        """Add the estimate of an accepted step, see `GradientNoise.estimate`; None adds nothing.

        Only steps of `train.log_every` count: the last step before a stop is logged too, and a
        run that was never stopped has no estimate of it.
        """
        if not self.section or estimate is None:
            return
        if step % self.config.train.log_every == 0:
            self.trace += estimate["trace"]
            self.square += estimate["square"]
            self.count += 1

    def decide(self, step: int) -> None:
        """Compare, if enough was measured, and double the batch after `step` if it is due.

        Collective: rank 0's estimates decide.
        """
        section, every = self.section, self.config.checkpoint.every_steps
        if section is None or not every or step % every or self.count < section.measured_steps:
            return
        scale = noise_scale([{"trace": self.trace, "square": self.square}])
        batches = self.loader.batches
        size = batches.batch_size(step)
        tokens = size * batches.sequence_length
        self.trace, self.square, self.count = 0.0, 0.0, 0
        is_above = scale is not None and scale > section.noise_ratio * tokens
        self.above = self.above + 1 if is_above else 0
        due = self.above >= COMPARISONS and size * FACTOR <= section.max_batch_size
        self.above, due, scale = self.group.broadcast([self.above, due, scale])
        if not due:
            return
        self.above = 0
        self.loader.change_batch(step, size * FACTOR)
        self.events.publish(BatchEvent(step, size * FACTOR, scale, self.loader.last_step))

    def publish_inherited(self) -> None:
        """Publish the decisions of the stable run that a decay begins from (train.decay_from).

        Readers of the run's records count its tokens by them.
        """
        if self.section:
            for step, size in self.loader.batches.changes[1:]:
                self.events.publish(BatchEvent(step, size, None, self.loader.last_step))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; the sizes that were decided are in the loader's state."""
        return {
            "trace": self.trace,
            "square": self.square,
            "count": self.count,
            "above": self.above,
        }

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Continue from what `state` returned; None: from nothing.

        Raises:
            KeyError, TypeError, ValueError: When it is not such a state.
        """
        state = EMPTY_STATE if state is None else state
        self.trace, self.square = float(state["trace"]), float(state["square"])
        self.count, self.above = int(state["count"]), int(state["above"])
