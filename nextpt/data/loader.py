"""Micro-batches of one rank, by optimizer step. Position is the step alone: there is no other state to save."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data_prep.format import PADDING, DatasetManifest
from nextpt.config import Config
from nextpt.data.batch import Batch, Row, collate
from nextpt.data.order import Order
from nextpt.data.rows import DomainRows, load_manifest, load_token_bytes
from nextpt.errors import ConfigError, DataError

AHEAD = 2  # optimizer steps read ahead


class Loader:
    """Reads the rows of one rank. One background thread reads ahead: it costs less than worker processes do.

    pin: copy batches into page-locked memory, for a GPU. Raises ConfigError when the dataset is not the one that the
    config describes, DataError when it is missing or damaged.
    """

    def __init__(self, config: Config, rank: int, world_size: int, *, pin: bool = False) -> None:
        self.config, self.rank, self.world_size, self.pin = config, rank, world_size, pin
        root = Path(config.data.path)
        self.manifest = load_manifest(root)
        check_dataset(config, self.manifest)
        self.domains = self.manifest.domains
        self._token_bytes = load_token_bytes(root, self.manifest.vocab_size)
        self._weights = np.array([config.objective.domain_weights.get(d, 1.0) for d in self.domains], dtype=np.float32)
        self._train = [DomainRows(root, self.manifest, "train", d) for d in self.domains]
        self._heldout = [DomainRows(root, self.manifest, "heldout", d) for d in self.domains]
        counts = [len(rows) for rows in self._train]
        mixing = config.data.mixing
        shares = [mixing.get(d, 0.0) for d in self.domains] if mixing else [float(n) for n in counts]
        self._order = Order(counts, shares, config.run.seed)
        self.wait_seconds = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: dict[int, Future[list[Batch]]] = {}

    @property
    def fingerprint(self) -> str:
        """Hash of all that the order of rows is a function of."""
        return self._order.fingerprint(self.manifest.fingerprint)

    def step_batches(self, step: int) -> list[Batch]:
        """The micro-batches of this rank for the step-th optimizer step, counted from 0."""
        started = time.monotonic()
        for wanted in range(step, step + 1 + AHEAD):
            if wanted not in self._ahead:
                self._ahead[wanted] = self._thread.submit(self._read_step, wanted)
        batches = self._ahead.pop(step).result()
        self.wait_seconds += time.monotonic() - started
        return batches

    def positions(self, step: int) -> list[range]:
        """Global positions of this rank's rows at a step (from 0), one range per micro-batch."""
        train, world = self.config.train, self.world_size
        first = step * train.global_batch_size + self.rank * train.micro_batch_size
        stride = train.micro_batch_size * world
        starts = (first + m * stride for m in range(self.config.accumulation_steps(world)))
        return [range(start, start + train.micro_batch_size) for start in starts]

    def validation_batches(self, domain: int, rows: int) -> Iterator[Batch]:
        """This rank's share of the first `rows` held-out rows of a domain; every rank gets the same number of batches.

        Places past the last row are filled with padding, which no sum counts.
        """
        available, size = self._heldout[domain], self.config.train.micro_batch_size
        rows = min(rows, len(available))
        for first in range(0, rows, size * self.world_size):
            start = first + self.rank * size
            indices = range(start, start + size)
            yield self._thread.submit(self._collate_indices, available, domain, indices, rows).result()

    def close(self) -> None:
        """Stop reading ahead."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _read_step(self, step: int) -> list[Batch]:
        return [self._collate([self._read(p) for p in positions]) for positions in self.positions(step)]

    def _read(self, position: int) -> Row:
        domain, row = self._order[position]
        return self._train[domain][row]

    def _collate_indices(self, source: DomainRows, domain: int, indices: range, stop: int) -> Batch:
        return self._collate([source[i] if i < stop else self._blank(domain) for i in indices])

    def _blank(self, domain: int) -> Row:
        length = self.manifest.sequence_length + 1
        return Row(np.zeros(length, np.int64), np.array([length]), np.array([PADDING]), domain)

    def _collate(self, rows: list[Row]) -> Batch:
        if self.config.objective.token_weights and any(r.token_weights is None and not r.doc_flags[0] & PADDING for r in rows):
            raise DataError(f"objective.token_weights is set, and {self.config.data.path} has no token_weights column")
        if not self.config.objective.token_weights:
            rows = [Row(r.tokens, r.doc_lens, r.doc_flags, r.domain) for r in rows]
        batch = collate(rows, self._token_bytes, self._weights)
        return batch.pinned() if self.pin else batch


def check_dataset(config: Config, manifest: DatasetManifest) -> None:
    """Raise ConfigError when the dataset does not fit the config."""
    path, data = config.data.path, config.data
    if manifest.sequence_length != data.sequence_length:
        raise ConfigError(f"data.sequence_length = {data.sequence_length}, but the rows of {path} hold {manifest.sequence_length}; "
                        "change the key or prepare the data again")
    if manifest.vocab_size != config.model.vocab_size:
        raise ConfigError(f"model.vocab_size = {config.model.vocab_size}, but the tokenizer of {path} has {manifest.vocab_size} "
                        f"tokens; set model.vocab_size={manifest.vocab_size}")
    for key, names in (("data.mixing", data.mixing or {}), ("objective.domain_weights", config.objective.domain_weights)):
        for name in names:
            if name not in manifest.domains:
                raise ConfigError(f"{key} names domain {name!r}; {path} has {', '.join(manifest.domains)}")
    if data.mixing is None:
        return
    for name, share in data.mixing.items():
        if not (share >= 0 and share < float("inf")):
            raise ConfigError(f"data.mixing.{name} = {share} must be finite and >= 0")
        if share > 0 and not manifest.splits["train"][name].rows:
            raise ConfigError(f"data.mixing.{name} = {share}, but {path} has no training rows of it")
    if not any(data.mixing.values()):
        raise ConfigError("data.mixing gives every domain the share 0; one must be above")
