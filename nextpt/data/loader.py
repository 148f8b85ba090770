"""Micro-batches of one rank, by optimizer step.

`step` is the number of completed optimizer steps, as in nextpt/train/loop.py: the batches at index
`step` are those that are trained on next. The position follows from it and from skipped data;
there is no other state.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from data_prep.format import PADDING
from data_prep.mds import StoredSequence
from nextpt.base.errors import DataError
from nextpt.config import Config
from nextpt.data.batch import Batch, collate, padding_sequence, segments_per_sequence
from nextpt.data.dataset import Dataset
from nextpt.data.order import GlobalOrder
from nextpt.data.plan import ORDER_VERSION, check_repeats, make_plan
from nextpt.data.sequences import SequenceSource

AHEAD = 2  # optimizer steps read ahead
WINDOWS_AHEAD = 2  # windows of shards made ready: the one being read and the next


class Loader:
    """Reads the rows of one rank.

    Threads make batches ahead, and have shards fetched and verified before those need them.

    pin: copy batches into page-locked memory, for a GPU. Raises ConfigError when the dataset is not
    the one that the config describes or the plan breaks a repeat cap, DataError when the dataset is
    missing or damaged.
    """

    def __init__(self, config: Config, rank: int, world_size: int, *, pin: bool = False) -> None:
        self.config, self.rank, self.world_size, self.pin = config, rank, world_size, pin
        self.dataset = Dataset(config)
        self.manifest, self.domains = self.dataset.manifest, self.dataset.domains
        self._weights = np.array(
            [config.objective.domain_weights.get(d, 1.0) for d in self.domains], dtype=np.float32
        )
        counts = [int(samples.sum()) for samples in self.dataset.sequences_per_shard]
        self.plan = make_plan(config, self.domains, counts)
        self._order = GlobalOrder(self.plan, self.dataset.sequences_per_shard)
        check_repeats(
            config,
            self.domains,
            counts,
            self._order.given(config.total_steps * config.train.global_batch_size),
        )
        shortest = min(stage.sequence_length for stage in self.plan.stages)
        self._segments = segments_per_sequence(
            self.manifest.sequence_length, shortest, self.dataset.max_segments()
        )
        self.wait_seconds = 0.0
        # Ranges of positions, rising, none beside another; whole steps
        self.skipped: list[tuple[int, int]] = []
        # StreamingDataset is asked by one thread: its cache is not meant for several.
        threads = config.data.prefetch_threads if config.data.backend == "native" else 1
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self._ahead: dict[int, Future[list[Batch]]] = {}
        # Domain -> samples of it for which shards were last made ready
        self._window: dict[int, tuple[int, int]] = {}
        self._window_lock = threading.Lock()

    def position(self, step: int) -> int:
        """First sample that is read after `step` completed steps, behind skipped data."""
        return step * self.config.train.global_batch_size + sum(
            stop - first for first, stop in self.skipped
        )

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint after `step` completed steps keeps: position, skipped data, and hashes."""
        position = self.position(step)
        return {
            "position": position,
            "skipped": [list(span) for span in self.skipped],
            "order_version": ORDER_VERSION,
            "dataset": self.manifest.fingerprint,
            "plan": self.plan.hash,
            "plan_before": self.plan.prefix_hash(position),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Read on from a state, whose data `check_state` compares.

        Raises KeyError, TypeError or ValueError for one that is none.
        """
        passed = [
            (int(first), int(stop))
            for first, stop in state.get("skipped", state.get("passed_over", []))
        ]
        edges = [edge for span in passed for edge in span]
        size = self.config.train.global_batch_size
        inside = all(0 <= edge <= state["position"] and edge % size == 0 for edge in edges)
        if edges != sorted(set(edges)) or not inside:
            raise ValueError(
                f"passed_over = {passed} are not whole steps before position {state['position']}"
            )
        self._forget_ahead()
        self.skipped = passed

    def skip_data(self, step: int, stop: int) -> None:
        """Continue at position `stop` after `step` completed steps, and skip what is before it."""
        first = self.position(step)
        self._forget_ahead()
        if self.skipped and self.skipped[-1][1] == first:
            first = self.skipped.pop()[0]
        self.skipped.append((first, stop))

    def _forget_ahead(self) -> None:
        for future in self._ahead.values():
            future.cancel()
        self._ahead.clear()

    def begins_stage(self, step: int) -> bool:
        """Whether a new stage of the plan begins after `step` completed steps."""
        first = self.position(step)
        before = next((begin for begin, stop in self.skipped if stop == first), first)
        return before > 0 and self.plan.stage_at(before - 1) != self.plan.stage_at(first)

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuse to go on from a state of other data: the samples before its position would not be those of this run.

        Stages after the position may differ. Raises DataError that says what differs.
        """
        if "order_version" not in state:
            raise DataError("it was saved by an older nextpt, whose order of samples was another")
        position, changed = state["position"], []
        if state["order_version"] != ORDER_VERSION:
            changed.append(
                f"the version of the order of samples ({state['order_version']} -> {ORDER_VERSION},"
                " by another nextpt)"
            )
        if state["dataset"] != self.manifest.fingerprint:
            changed.append(
                f"the dataset (fingerprint {state['dataset'][:12]} ->"
                f" {self.manifest.fingerprint[:12]})"
            )
        elif state["plan_before"] != self.plan.prefix_hash(position):
            changed.append(
                f"the plan before sample {position} (data.mixing, data.stages, run.seed; later"
                " stages may change)"
            )
        if changed:
            raise DataError("changed since: " + " and ".join(changed))

    def step_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches at index `step`: those trained on after `step` completed steps.

        Raises DataError when one of its shards cannot be read; steps before are not disturbed by
        what is read ahead.
        """
        started = time.monotonic()
        for old in [s for s in self._ahead if not step <= s <= step + AHEAD]:
            self._ahead.pop(old).cancel()
        for wanted in range(step, step + 1 + AHEAD):
            if wanted not in self._ahead:
                self._ahead[wanted] = self._threads.submit(self._read_step, wanted)
        try:
            return self._ahead.pop(step).result()
        finally:
            self.wait_seconds += time.monotonic() - started

    def positions(self, step: int) -> list[range]:
        """Positions of this rank's micro-batches at index `step`, one range per micro-batch."""
        train, world = self.config.train, self.world_size
        first = self.position(step) + self.rank * train.micro_batch_size
        stride = train.micro_batch_size * world
        starts = (first + m * stride for m in range(self.config.accumulation_steps(world)))
        return [range(start, start + train.micro_batch_size) for start in starts]

    def validation_batches(self, domain: int, rows: int) -> Iterator[Batch]:
        """This rank's share of the first `rows` held-out rows of a domain.

        Every rank gets the same number of batches.

        Places past the last row are filled with padding, which no sum counts. The context is always
        the whole row.
        """
        available, size = (
            self.dataset.sequences["heldout"][domain],
            self.config.train.micro_batch_size,
        )
        rows = min(rows, len(available))
        for first in range(0, rows, size * self.world_size):
            start = first + self.rank * size
            yield self._threads.submit(
                self._heldout_batch, available, domain, range(start, start + size), rows
            ).result()

    def close(self) -> None:
        """Stop reading ahead."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.dataset.close()

    def _read_step(self, step: int) -> list[Batch]:
        parts = [
            self._order.nths(positions.start, positions.stop) for positions in self.positions(step)
        ]
        domains, nths = (np.concatenate(column) for column in zip(*parts, strict=True))
        self._look_ahead(domains, nths)
        rows, train = self._order.rows(domains, nths).tolist(), self.dataset.sequences["train"]
        context = self._order.sequence_length(self.position(step))
        return self._collate(
            [train[domain][row] for domain, row in zip(domains.tolist(), rows, strict=True)],
            context,
        )

    def _look_ahead(self, domains: np.ndarray, nths: np.ndarray) -> None:
        """Have the shards made ready of the window that a domain has come to, and of the next."""
        for domain in np.unique(domains).tolist():
            nth = int(nths[domains == domain][-1])
            with self._window_lock:
                begin, end = self._window.get(domain, (0, 0))
                if begin <= nth < end:
                    continue
                shards, end = self._order.domains[domain].shards_ahead(nth, WINDOWS_AHEAD)
                self._window[domain] = (nth, end)
            self.dataset.sequences["train"][domain].prepare(shards)

    def _heldout_batch(
        self, source: SequenceSource, domain: int, indices: range, stop: int
    ) -> Batch:
        length = self.manifest.sequence_length
        return self._collate(
            [source[i] if i < stop else padding_sequence(length + 1, domain) for i in indices],
            length,
        )[0]

    def _collate(self, rows: list[StoredSequence], context: int) -> list[Batch]:
        if not self.config.objective.token_weights:
            rows = [
                row._replace(token_weights=None) if row.token_weights is not None else row
                for row in rows
            ]
        elif any(row.token_weights is None and not row.doc_flags[0] & PADDING for row in rows):
            raise DataError(
                f"objective.token_weights is set, and {self.config.data.path} has no token_weights"
                " column"
            )
        size = self.config.train.micro_batch_size
        batches = collate(
            rows,
            size,
            self.dataset.token_bytes,
            self._weights,
            segments=self._segments,
            context=context,
        )
        return [batch.pin_memory() for batch in batches] if self.pin else batches
