"""SequenceSource of one domain by number: which shard a row is in, reading it there, and having shards ready before they are needed."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from data_prep.format import DatasetManifest
from data_prep.mds import MappedShard, StoredSequence
from nextpt.base.errors import DataError
from nextpt.data.domain_order import WINDOW
from nextpt.data.store import ShardStore

# Open maps of a domain: the window being read, the one after it, and the ends of steps read ahead
MAPS = 2 * WINDOW + 2
TRIES = 10


class SequenceSource(Protocol):
    """SequenceSource 0..len-1 of a domain. Raises DataError that names the file, IndexError past the end."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> StoredSequence: ...

    def prepare(self, shards: Iterable[int]) -> None:
        """Begin to make shards ready, in this order."""


def load_manifest(path: str | Path) -> DatasetManifest:
    """The manifest of a dataset folder. Raises DataError that names the file and the way out."""
    return DatasetManifest.load(Path(path))


def load_token_bytes(path: str | Path, vocab_size: int) -> np.ndarray:
    """int32 [V]: UTF-8 bytes of each token, 0 for special ones."""
    file = Path(path) / "token_bytes.npy"
    try:
        sizes = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}; prepare the data again") from None
    if sizes.shape != (vocab_size,):
        raise DataError(
            f"{file} has shape {sizes.shape}, expected ({vocab_size},); prepare the data again"
        )
    return sizes.astype(np.int32)


class MappedSequences:
    """SequenceSource read from memory maps. domain: label of the rows. threads: make shards ready ahead.

    Shared by all domains.
    """

    def __init__(self, store: ShardStore, domain: int, threads: ThreadPoolExecutor) -> None:
        self._store, self._domain, self._threads = store, domain, threads
        self._starts = [0, *np.cumsum(store.index.samples).tolist()]
        self._lock = threading.Lock()
        self._maps: OrderedDict[int, MappedShard] = OrderedDict()
        self._coming: dict[int, Future[Path]] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> StoredSequence:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect_right(self._starts, index) - 1
        return self._map(shard).sequence(index - self._starts[shard])

    def prepare(self, shards: Iterable[int]) -> None:
        with self._lock:
            for shard in shards:
                if shard not in self._maps and shard not in self._coming:
                    self._coming[shard] = self._threads.submit(self._store.ready, shard)

    def _map(self, shard: int) -> MappedShard:
        with self._lock:
            if found := self._maps.get(shard):
                self._maps.move_to_end(shard)
                return found
            coming = self._coming.pop(shard, None)
        opened = self._open(shard, coming)
        with self._lock:
            self._maps[shard] = opened
            while len(self._maps) > MAPS:
                self._maps.popitem(last=False)
        return opened

    def _open(self, shard: int, coming: Future[Path] | None) -> MappedShard:
        """What was begun ahead is waited for.

        What has not begun is done here and now, before what is less urgent.
        """
        path = None
        if coming is not None and not coming.cancel():
            path = coming.result()
        for _ in range(TRIES):
            path = path or self._store.ready(shard)
            try:
                opened = MappedShard(
                    path, self._store.index[shard].samples, self._store.index.columns, self._domain
                )
            except FileNotFoundError:
                path = None  # another process needed the room
                continue
            except OSError as error:
                raise DataError(f"{path}: {error.strerror or error}") from error
            self._store.touch(shard, path)
            return opened
        raise DataError(
            f"{self._store.folder}/{self._store.index[shard].raw.name} was deleted {TRIES} times"
            " before it could be opened; raise data.cache_limit_gib, or keep others from that"
            " folder"
        )
