"""Data loader: the micro-batches of one rank, by optimizer step.

`step` is the number of completed optimizer steps, as in nextpt/train/loop.py: the batches at index
`step` are those that are trained on next. The position in the global order follows from it and from
skipped data; there is no other state.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.format import PADDING
from data_prep.mds import StoredSequence
from nextpt.base.errors import DataError
from nextpt.config import BatchSchedule, Config
from nextpt.data.batch import Batch, collate, padding_sequence, segments_per_sequence
from nextpt.data.dataset import Dataset
from nextpt.data.epochs import count_epoch_of
from nextpt.data.order import GlobalOrder
from nextpt.data.plan import ORDER_VERSION, build_plan, check_max_epochs
from nextpt.data.sequences import SequenceSource

STEPS_AHEAD = 2  # optimizer steps read ahead
WINDOWS_AHEAD = 2  # windows of shards prepared: the current one and the next


class Loader:
    """Reads the batches of one rank.

    Threads build batches ahead, and fetch and verify shards before those need them.

    Args:
        config: The run. The loader's own has train.epoch_sequences where it has train.epochs.
        rank: This rank.
        world_size: Number of ranks.
        pin: Copy batches into page-locked memory, for a GPU.
        job_start: When the job started, seconds since 1970 by this machine's clock; see
            data.verify.

    Raises:
        ConfigError: The dataset is not the one that the config describes, the plan has more epochs
            than data.max_epochs, or a batch cannot be divided among the ranks.
        DataError: The dataset is missing or damaged.
    """

    def __init__(
        self,
        config: Config,
        rank: int,
        world_size: int,
        *,
        pin: bool = False,
        job_start: float = 0.0,
    ) -> None:
        config.accumulation_steps(world_size)  # raises where a batch cannot be divided
        self.rank = rank
        self.world_size = world_size
        self.pin = pin
        self.dataset = Dataset(config, job_start)
        self.manifest = self.dataset.manifest
        self.config = config = count_epoch_of(config, self.manifest)
        self.domains = self.dataset.domains
        self._weights = np.array(
            [config.objective.domain_weights.get(d, 1.0) for d in self.domains], dtype=np.float32
        )
        sizes = [int(shards.sum()) for shards in self.dataset.shard_sizes]
        self.batches = config.batches
        self.plan = build_plan(config, self.domains, sizes)
        self._order = GlobalOrder(self.plan, self.dataset.shard_sizes)
        planned = self._order.domain_counts(self.batches.consumed(config.total_steps))
        check_max_epochs(config, self.domains, sizes, planned)
        shortest = min(stage.sequence_length for stage in self.plan.stages)
        self._segments = segments_per_sequence(
            self.manifest.sequence_length, shortest, self.dataset.max_segments()
        )
        self.wait_seconds = 0.0
        # Ranges of skipped positions: rising, none adjacent to another, whole steps
        self.skipped: list[tuple[int, int]] = []
        # StreamingDataset is asked by one thread: its cache is not meant for several.
        threads = config.data.prefetch_threads if config.data.backend == "native" else 1
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self._ahead: dict[int, Future[list[Batch]]] = {}
        # Domain -> range of its draws for which shards were last prepared
        self._window: dict[int, tuple[int, int]] = {}
        self._window_lock = threading.Lock()

    def position(self, step: int) -> int:
        """First position that is read after `step` completed steps, behind skipped data."""
        return self.batches.consumed(step) + sum(stop - first for first, stop in self.skipped)

    def state(self, step: int) -> dict[str, Any]:
        """State for a checkpoint after `step` completed steps: position, skipped data, hashes."""
        position = self.position(step)
        return {
            "position": position,
            "batches": [list(change) for change in self.batches.changes],
            "skipped": [list(span) for span in self.skipped],
            "order_version": ORDER_VERSION,
            "dataset": self.manifest.fingerprint,
            "tokenizer_sha256": self.manifest.tokenizer_sha256,
            "plan": self.plan.hash,
            "plan_before": self.plan.prefix_hash(position),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a state. `check_state` compares its data.

        Raises:
            KeyError: A field is missing.
            TypeError: A field has another type.
            ValueError: The skipped ranges are not whole steps before the position.
        """
        skipped, batches = _skipped(state), self.batches_of(state)
        edges = [edge for span in skipped for edge in span]
        size = batches.common_divisor
        inside = all(0 <= edge <= state["position"] and edge % size == 0 for edge in edges)
        if edges != sorted(set(edges)) or not inside:
            raise ValueError(
                f"skipped = {skipped} are not whole steps before position {state['position']}"
            )
        self._cancel_ahead()
        self.skipped, self.batches = skipped, batches

    def batches_of(self, state: dict[str, Any]) -> BatchSchedule:
        """Batch size by step after a state: with train.batch_growth, what was decided until then.

        Otherwise the schedule of the config; `check_state` compares its past.
        """
        planned = self.config.batches
        if self.config.train.batch_growth is None or "batches" not in state:
            return planned
        stored = _stored_batches(state, planned)
        step = stored.steps_for(_consumed(state))
        return replace(stored, changes=tuple(c for c in stored.changes if c[0] <= step))

    def change_batch(self, step: int, batch_size: int) -> None:
        """Make the steps after `step` completed ones with another batch size."""
        self._cancel_ahead()
        self.batches = self.batches.with_change(step, batch_size)

    @property
    def last_step(self) -> int:
        """Step after which training ends."""
        return self.config.last_step_with(self.batches)

    def skip_data(self, step: int, stop: int) -> None:
        """Continue at position `stop` after `step` completed steps, and skip what is before it."""
        first = self.position(step)
        self._cancel_ahead()
        if self.skipped and self.skipped[-1][1] == first:
            first = self.skipped.pop()[0]
        self.skipped.append((first, stop))

    def begins_stage(self, step: int) -> bool:
        """Whether a new stage of the plan begins after `step` completed steps."""
        first = self.position(step)
        before = next((begin for begin, stop in self.skipped if stop == first), first)
        return before > 0 and self.plan.stage_at(before - 1) != self.plan.stage_at(first)

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuse a state of other data: earlier sequences would not be those of this run.

        Stages after the position may differ.

        Raises:
            DataError: Something differs. Says what.
        """
        if "order_version" not in state:
            raise DataError("it was saved by an older nextpt, which had another order of sequences")
        position, changed = state["position"], []
        if state["order_version"] != ORDER_VERSION:
            changed.append(
                "the version of the order of sequences"
                f" ({state['order_version']} -> {ORDER_VERSION}, by another nextpt)"
            )
        if state["dataset"] != self.manifest.fingerprint:
            changed.append(
                f"the dataset (fingerprint {state['dataset'][:12]} ->"
                f" {self.manifest.fingerprint[:12]})"
            )
        elif state["plan_before"] != self.plan.prefix_hash(position):
            changed.append(
                f"the plan before sequence {position} (data.mixing, data.stages, run.seed; later"
                " stages may change)"
            )
        stored, planned = _stored_batches(state, self.config.batches), self.batches_of(state)
        steps = stored.steps_for(_consumed(state))
        if stored.phases(steps) != planned.phases(steps):
            changed.append(
                f"the batch sizes before step {steps} (train.batch_schedule; later changes may"
                " differ)"
            )
        if changed:
            raise DataError("changed since: " + " and ".join(changed))

    def step_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches at index `step`: those trained on after `step` completed steps.

        Raises:
            DataError: A shard of this step cannot be read. What is read ahead disturbs no earlier
                step.
        """
        started = time.monotonic()
        for old in [s for s in self._ahead if not step <= s <= step + STEPS_AHEAD]:
            self._ahead.pop(old).cancel()
        for ahead in range(step, step + 1 + STEPS_AHEAD):
            if ahead not in self._ahead:
                self._ahead[ahead] = self._threads.submit(self._read_step, ahead)
        try:
            return self._ahead.pop(step).result()
        finally:
            self.wait_seconds += time.monotonic() - started

    def positions(self, step: int) -> list[range]:
        """Positions of this rank's sequences at index `step`, one range per micro-batch."""
        size = self.config.train.micro_batch_size
        first = self.position(step)
        stop = first + self.batches.batch_size(step)
        starts = range(first + self.rank * size, stop, size * self.world_size)
        return [range(start, start + size) for start in starts]

    def validation_batches(self, domain: int, count: int) -> Iterator[Batch]:
        """This rank's share of the first `count` validation sequences of a domain.

        Every rank gets the same number of batches; they are filled up with padding, which no sum
        counts. The context is always the whole sequence.
        """
        source = self.dataset.sequences["validation"][domain]
        count, size = min(count, len(source)), self.config.train.micro_batch_size
        for first in range(0, count, size * self.world_size):
            start = first + self.rank * size
            indices = range(start, start + size)
            yield self._threads.submit(
                self._validation_batch, source, domain, indices, count
            ).result()

    def close(self) -> None:
        """Stop reading ahead."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.dataset.close()

    def _cancel_ahead(self) -> None:
        for future in self._ahead.values():
            future.cancel()
        self._ahead.clear()

    def _read_step(self, step: int) -> list[Batch]:
        parts = [self._order.draws(span.start, span.stop) for span in self.positions(step)]
        domains, draws = (np.concatenate(column) for column in zip(*parts, strict=True))
        self._prepare_shards(domains, draws)
        indices = self._order.sequences(domains, draws).tolist()
        sources = self.dataset.sequences["train"]
        sequences = [
            sources[domain][index] for domain, index in zip(domains.tolist(), indices, strict=True)
        ]
        numbers = [number for span in self.positions(step) for number in span]
        return self._collate(sequences, numbers, self._order.sequence_length(self.position(step)))

    def _prepare_shards(self, domains: npt.NDArray[np.int64], draws: npt.NDArray[np.int64]) -> None:
        """Prepare the shards of each domain's current window, and of the next."""
        for domain in np.unique(domains).tolist():
            draw = int(draws[domains == domain][-1])
            with self._window_lock:
                begin, end = self._window.get(domain, (0, 0))
                if begin <= draw < end:
                    continue
                shards, end = self._order.domains[domain].shards_ahead(draw, WINDOWS_AHEAD)
                self._window[domain] = (draw, end)
            self.dataset.sequences["train"][domain].prepare(shards)

    def _validation_batch(
        self, source: SequenceSource, domain: int, indices: range, stop: int
    ) -> Batch:
        length = self.manifest.sequence_length
        sequences = [
            source[i] if i < stop else padding_sequence(length + 1, domain) for i in indices
        ]
        return self._collate(sequences, indices, length)[0]

    def _collate(
        self, sequences: list[StoredSequence], numbers: Sequence[int], context: int
    ) -> list[Batch]:
        if not self.config.objective.token_weights:
            sequences = [
                s._replace(token_weights=None) if s.token_weights is not None else s
                for s in sequences
            ]
        elif any(s.token_weights is None and not s.doc_flags[0] & PADDING for s in sequences):
            raise DataError(
                f"objective.token_weights is set, and {self.config.data.path} has no token_weights"
                " column; leave it out, or prepare the data with weights"
            )
        batches = collate(
            sequences,
            self.config.train.micro_batch_size,
            self.dataset.token_bytes,
            self._weights,
            numbers=numbers,
            segments=self._segments,
            context=context,
        )
        return [batch.pin_memory() for batch in batches] if self.pin else batches


def _skipped(state: dict[str, Any]) -> list[tuple[int, int]]:
    """Skipped ranges of a state of the loader."""
    spans = state.get("skipped", state.get("passed_over", []))  # until df2806d: passed_over
    return [(int(first), int(stop)) for first, stop in spans]


def _consumed(state: dict[str, Any]) -> int:
    """Sequences that were trained on before a state."""
    return int(state["position"]) - sum(stop - first for first, stop in _skipped(state))


def _stored_batches(state: dict[str, Any], planned: BatchSchedule) -> BatchSchedule:
    """Batch size by step that a state was saved with; those of before 2026-12 had one size."""
    changes = state.get("batches", planned.changes[:1])
    return replace(planned, changes=tuple((int(step), int(size)) for step, size in changes))
