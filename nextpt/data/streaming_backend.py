"""Streaming backend: sequences read by mosaicml-streaming itself (data.backend = streaming).

The order stays nextpt's; StreamingDataset serves as a store that is asked for sample i. So both
backends give the same sequences in the same order, each can be checked against the other, and
StreamingDataset's pitfalls are avoided:

- Its own iteration, with worker processes, locks per sample and a state without a fingerprint, is
  not used; the state of a run is our position with either backend. Everything its order depends on
  is still set, never left to defaults.
- It needs LOCAL_WORLD_SIZE, which deepspeed does not set (import_streaming does).
- cache_limit deletes shards that have no remote: refused without data.remote.
- It verifies a hash only when it downloads or unpacks; files on disk are verified by our store
  first.
- It refuses a folder that another StreamingDataset of the machine names, so two runs cannot share
  one; the native backend can. It takes what a killed process left in shared memory for such a
  dataset: that is removed first.
- It takes the first free number of the machine's shared memory, and fails when another run takes
  the same at that moment: runs open theirs one after the other.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from data_prep.mds import StoredSequence
from data_prep.streaming_compat import import_streaming
from nextpt.base.errors import ConfigError, DataError
from nextpt.base.processes import mapped_files, open_files
from nextpt.config import Config
from nextpt.data.store import ShardStore

_SHARED_MEMORY = Path("/dev/shm")
# Of a StreamingDataset there: segments of at least a page, and bytes for the state and the last use
# of each shard (mosaicml-streaming, base/dataset.py)
_SEGMENTS, _SHARD_BYTES = 8, 9
# Two jobs that share several machines could each wait for the other: a job waits so long at most.
_LOCK_SECONDS = 60.0


def open_split(config: Config, stores: list[ShardStore]) -> Any:
    """Open a StreamingDataset over the non-empty domains of a split, in order. Collective.

    Returns:
        The dataset; None when every domain is empty.

    Raises:
        ConfigError: The settings would lose data.
        DataError: StreamingDataset cannot open it.
    """
    streaming = import_streaming()

    if config.data.cache_limit_gib and not config.data.remote:
        raise ConfigError(
            "data.cache_limit_gib without data.remote: StreamingDataset would delete the only copy"
            " of each shard; leave it out"
        )
    stores = [store for store in stores if len(store.index)]
    if not stores:
        return None
    remote = config.data.remote.rstrip("/") if config.data.remote else None
    streams = [
        streaming.Stream(
            remote=f"{remote}/{store.name}" if remote else None, local=str(store.folder)
        )
        for store in stores
    ]
    limit = int(config.data.cache_limit_gib * 2**30) if config.data.cache_limit_gib else None
    check_shared_memory(sum(len(store.index) for store in stores))
    try:
        with shared_memory_lock():
            return streaming.StreamingDataset(
                streams=streams,
                validate_hash="xxh64",
                keep_zip=False,
                cache_limit=limit,
                batch_size=config.train.micro_batch_size,
                predownload=config.train.micro_batch_size,
                num_canonical_nodes=1,
                shuffle=False,
                shuffle_algo="py1e",
                shuffle_seed=config.run.seed,
                shuffle_block_size=2**18,
                sampling_method="balanced",
                partition_algo="relaxed",
                batching_method="random",
                allow_unsafe_types=False,
            )
    except (ValueError, RuntimeError, OSError) as error:
        raise DataError(
            f"StreamingDataset cannot open {config.data.path}: {' '.join(str(error).split())}"
        ) from error


@contextmanager
def shared_memory_lock(
    shared: Path = _SHARED_MEMORY, seconds: float = _LOCK_SECONDS
) -> Iterator[None]:
    """Let no other job of this machine create shared memory of a StreamingDataset. Collective.

    The lock is the kernel's, on the folder itself: it needs no file that all users can write, and
    a killed process leaves none.

    Args:
        shared: Folder of POSIX shared memory; without it nothing is locked.
        seconds: Longest time to wait for another job; then this one goes on without the lock.
    """
    folder = None
    if os.environ.get("LOCAL_RANK", "0") == "0" and shared.is_dir():
        folder = os.open(shared, os.O_RDONLY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + seconds
        while folder is not None and time.monotonic() < deadline:
            with suppress(BlockingIOError):
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.05)
        if dist.is_initialized():
            # Every rank looks for a free number, not only the one that takes it
            dist.barrier(group=dist.group.WORLD)
        yield
    finally:
        if folder is not None:
            os.close(folder)


def check_shared_memory(shards: int, shared: Path = _SHARED_MEMORY) -> None:
    """Check that the shared memory of a StreamingDataset fits the folder for it.

    The kernel kills a process that writes to shared memory for which there is no room.

    Args:
        shards: Shards of the dataset.
        shared: Folder of POSIX shared memory.

    Raises:
        ConfigError: It does not.
    """
    needed = _SEGMENTS * mmap.PAGESIZE + _SHARD_BYTES * shards
    if shared.is_dir() and (free := shutil.disk_usage(shared).free) < needed:
        raise ConfigError(
            f"{shared} has {free} bytes left, data.backend=streaming needs {needed}; free some, or"
            " set data.backend=native, which needs none"
        )


def remove_stale(folders: list[str], shared: Path = _SHARED_MEMORY) -> None:
    """Remove shared memory of datasets in these folders that no process has open or mapped.

    A job that is killed as a whole leaves it, and StreamingDataset would refuse the folders to the
    next job. Every rank calls this before it opens its first dataset: opening one maps what others
    left, and creates nothing before all ranks are there.

    Args:
        folders: Local folders of the datasets.
        shared: Folder of POSIX shared memory.
    """
    ours = {os.path.abspath(folder) for folder in folders}
    groups: list[list[Path]] = []
    for path in shared.glob("[0-9]*_locals") if shared.is_dir() else ():
        try:
            data = path.read_bytes()
            theirs = data[4 : int.from_bytes(data[:4], "little")].decode().split("\0")[:-1]
        except (OSError, ValueError):
            continue  # another user's, deleted meanwhile, or of another program
        if ours & {os.path.abspath(folder) for folder in theirs}:
            groups.append(list(shared.glob(f"{path.name.removesuffix('locals')}*")))
    used = set(open_files()) | set(mapped_files()) if groups else set()
    for group in groups:
        if not used & set(map(str, group)):
            for path in group:
                path.unlink(missing_ok=True)


class StreamingSequences:
    """Sequences of one domain, read from a split's StreamingDataset.

    Args:
        store: Shards of the domain.
        domain: Index to label the sequences with.
        dataset: The StreamingDataset of the split.
        first: Its sample that is the domain's first sequence.
    """

    def __init__(self, store: ShardStore, domain: int, dataset: Any, first: int) -> None:
        self._store = store
        self._domain = domain
        self._dataset = dataset
        self._first = first
        self._starts = np.concatenate(([0], np.cumsum(store.index.counts)))
        self._verified: set[int] = set()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> StoredSequence:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        name = self._store.index[shard].raw.name
        if shard not in self._verified and (self._store.folder / name).exists():
            self._store.ensure_local(shard)
            self._verified.add(shard)
        try:
            sample = self._dataset[self._first + index]
        except Exception as error:
            raise DataError(
                f"{self._store.folder}/{name}: StreamingDataset: {' '.join(str(error).split())}"
            ) from error
        return StoredSequence(
            sample["tokens"],
            sample["doc_lens"],
            sample["doc_flags"],
            self._domain,
            sample.get("token_weights"),
            sample.get("target_bytes"),
        )

    def prepare(self, shards: Iterable[int]) -> None:
        """Do nothing: StreamingDataset fetches a shard when a sequence of it is read."""


def open_streaming_sequences(config: Config, stores: list[ShardStore]) -> list[StreamingSequences]:
    """Open the sequences of every domain of a split. Collective."""
    dataset, first = open_split(config, stores), 0
    sources: list[StreamingSequences] = []
    for domain, store in enumerate(stores):
        sources.append(StreamingSequences(store, domain, dataset, first))
        first += len(sources[-1])
    return sources
