"""Sequences of one domain by number, read from memory-mapped shards that are prepared ahead."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from data_prep.format import DatasetManifest
from data_prep.mds import MappedShard, StoredSequence
from nextpt.base.errors import DataError
from nextpt.base.files import sha256_file
from nextpt.data.domain_order import WINDOW
from nextpt.data.store import ShardStore

# Open maps of a domain: the current window, the next one, and the ends of steps read ahead
MAPS = 2 * WINDOW + 2
_OPEN_ATTEMPTS = 10  # of a shard that other processes delete from the cache


class SequenceSource(Protocol):
    """Sequences 0..len-1 of a domain.

    Reading raises DataError that names the file, or IndexError past the end.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> StoredSequence: ...

    def prepare(self, shards: Iterable[int]) -> None:
        """Begin to bring shards to this machine, in this order."""


def load_manifest(path: str | Path) -> DatasetManifest:
    """Read the manifest of a dataset folder. Raises DataError that names the file and the fix."""
    return DatasetManifest.load(Path(path))


def load_token_bytes(
    path: str | Path, vocab_size: int, sha256: str | None = None
) -> npt.NDArray[np.int32]:
    """Read UTF-8 bytes of each token, 0 for special ones.

    Args:
        path: Dataset folder.
        vocab_size: V.
        sha256: Hash of the file; None where the dataset has none.

    Returns:
        int32 [V].

    Raises:
        DataError: The file is missing or damaged.
    """
    file = Path(path) / "token_bytes.npy"
    try:
        # Mapped: a damaged head cannot ask for more memory than the file has bytes
        sizes = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, OverflowError, EOFError, SyntaxError) as error:
        raise DataError(f"{file} cannot be read: {error}; prepare the data again") from None
    if sizes.shape != (vocab_size,) or sizes.dtype.kind != "u":
        raise DataError(
            f"{file} has {sizes.dtype} {sizes.shape}, expected unsigned integers ({vocab_size},);"
            " prepare the data again"
        )
    if sha256 is not None and sha256_file(file) != sha256:
        raise DataError(
            f"{file} is damaged (its hash is not the one in dataset.json); prepare the data again"
            " or copy it anew"
        )
    token_bytes: npt.NDArray[np.int32] = sizes.astype(np.int32)
    return token_bytes


class MappedSequences:
    """Sequences of a domain, read from memory maps.

    Args:
        store: Its shards.
        domain: Index to label the sequences with.
        threads: Prepare shards ahead. Shared by all domains.
    """

    def __init__(self, store: ShardStore, domain: int, threads: ThreadPoolExecutor) -> None:
        self._store = store
        self._domain = domain
        self._threads = threads
        self._starts: list[int] = [0, *np.cumsum(store.index.counts).tolist()]
        self._lock = threading.Lock()
        self._maps: OrderedDict[int, MappedShard] = OrderedDict()
        self._pending: dict[int, Future[Path]] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> StoredSequence:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect_right(self._starts, index) - 1
        return self._map(shard).sequence(index - self._starts[shard])

    def prepare(self, shards: Iterable[int]) -> None:
        """Begin to bring shards to this machine, in this order."""
        with self._lock:
            for shard in shards:
                if shard not in self._maps and shard not in self._pending:
                    self._pending[shard] = self._threads.submit(self._store.ensure_local, shard)

    def _map(self, shard: int) -> MappedShard:
        with self._lock:
            if mapped := self._maps.get(shard):
                self._maps.move_to_end(shard)
                return mapped
            pending = self._pending.pop(shard, None)
        mapped = self._open(shard, pending)
        with self._lock:
            self._maps[shard] = mapped
            while len(self._maps) > MAPS:
                self._maps.popitem(last=False)
        return mapped

    def _open(self, shard: int, pending: Future[Path] | None) -> MappedShard:
        """Open a shard.

        Work that has begun is waited for; what has not is done in this thread, before what is less
        urgent.
        """
        path = None
        if pending is not None and not pending.cancel():
            path = pending.result()
        count, columns = self._store.index[shard].count, self._store.index.columns
        for _ in range(_OPEN_ATTEMPTS):
            path = path or self._store.ensure_local(shard)
            try:
                mapped = MappedShard(path, count, columns, self._domain)
            except FileNotFoundError:
                path = None  # another process needed the room
                continue
            except OSError as error:
                raise DataError(f"{path}: {error.strerror or error}") from error
            self._store.mark_used(shard, path)
            return mapped
        raise DataError(
            f"{self._store.folder}/{self._store.index[shard].raw.name} was deleted"
            f" {_OPEN_ATTEMPTS} times before it could be opened; raise data.cache_limit_gib, or"
            " keep others from that folder"
        )
