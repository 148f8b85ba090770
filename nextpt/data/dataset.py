"""A dataset as a run sees it: manifest, tables, and the rows of every domain of both splits, by either backend."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data_prep.format import SPLITS, DatasetManifest
from nextpt.base.errors import ConfigError
from nextpt.config import Config
from nextpt.data.domain_order import WINDOW
from nextpt.data.index import ShardIndex
from nextpt.data.remote import RemoteDataset
from nextpt.data.scratch import ScratchFolder
from nextpt.data.sequences import MappedSequences, SequenceSource, load_manifest, load_token_bytes
from nextpt.data.store import ShardCache, ShardStore
from nextpt.data.streaming_backend import open_streaming_sequences, remove_stale

SHARD_THREADS = 4  # shards fetched, unpacked or verified at the same time; most of it is waiting


class Dataset:
    """The dataset of a config, fetched first where it is remote. rows[split][domain].

    samples[domain]: training rows of each shard.

    Raises ConfigError when it is not the one that the config describes, DataError when it is
    missing or damaged.
    """

    def __init__(self, config: Config) -> None:
        root, data = Path(config.data.path), config.data
        node = ScratchFolder(data.scratch)
        remote = RemoteDataset(data.remote, root) if data.remote else None
        if remote:
            remote.fetch_dataset(node)
        self.manifest = load_manifest(root)
        check_dataset(config, self.manifest)
        self.domains = self.manifest.domains
        self.token_bytes = load_token_bytes(root, self.manifest.vocab_size)
        cache = ShardCache(
            node, int(data.cache_limit_gib * 2**30) if data.cache_limit_gib else None
        )
        self.threads = ThreadPoolExecutor(SHARD_THREADS, thread_name_prefix="shards")
        self._stores = {
            split: [self._store(root, split, d, node, remote, cache) for d in self.domains]
            for split in SPLITS
        }
        if data.backend == "native":
            cache.check(self._read_together())
            self.sequences: dict[str, list[SequenceSource]] = {
                split: [MappedSequences(store, d, self.threads) for d, store in enumerate(stores)]
                for split, stores in self._stores.items()
            }
        else:
            remove_stale(
                [str(store.folder) for stores in self._stores.values() for store in stores]
            )
            self.sequences = {
                split: list(open_streaming_sequences(config, stores, self.threads))
                for split, stores in self._stores.items()
            }
        self.sequences_per_shard = [store.index.samples for store in self._stores["train"]]

    def max_segments(self) -> int | None:
        """The most segments of any row, where the manifest knows."""
        known = [
            counts.max_segments
            for domains in self.manifest.splits.values()
            for counts in domains.values()
            if counts.rows
        ]
        return None if None in known else max(known, default=None)

    def close(self) -> None:
        """Stop fetching."""
        self.threads.shutdown(wait=False, cancel_futures=True)

    def _store(
        self,
        root: Path,
        split: str,
        domain: str,
        node: ScratchFolder,
        remote: RemoteDataset | None,
        cache: ShardCache,
    ) -> ShardStore:
        return ShardStore(
            ShardIndex(root, self.manifest, split, domain), f"{split}/{domain}", node, remote, cache
        )

    def _read_together(self) -> int:
        """Bytes of the largest shards that two windows of every domain can hold, packed forms beside raw ones."""
        sizes = [
            np.sort(store.index.bytes + store.index.packed_bytes)[-2 * WINDOW :].sum()
            for store in self._stores["train"]
        ]
        return int(sum(sizes))


def open_sequences(root: Path, split: str) -> dict[str, MappedSequences]:
    """Domain -> its rows in stored order, of a split of a dataset folder of this machine.

    No run needed. Raises DataError.
    """
    manifest, node = load_manifest(root), ScratchFolder()
    cache = ShardCache(node, None)
    # Nothing is begun ahead, so the threads that could are never made.
    threads = ThreadPoolExecutor(SHARD_THREADS, thread_name_prefix="shards")
    stores = [
        ShardStore(
            ShardIndex(root, manifest, split, domain), f"{split}/{domain}", node, None, cache
        )
        for domain in manifest.domains
    ]
    return {
        domain: MappedSequences(store, number, threads)
        for number, (domain, store) in enumerate(zip(manifest.domains, stores, strict=True))
    }


def check_dataset(config: Config, manifest: DatasetManifest) -> None:
    """Raise ConfigError when the dataset does not fit the config.

    The plan (plan.py) checks the mixtures.
    """
    path, data = config.data.path, config.data
    if manifest.sequence_length != data.sequence_length:
        raise ConfigError(
            f"data.sequence_length = {data.sequence_length}, but the rows of {path} hold"
            f" {manifest.sequence_length}; change the key or prepare the data again"
        )
    # Published models have more rows than their tokenizers have tokens, for even shapes; elsewhere
    # it is a mistake.
    wider = config.train.init_from is not None and config.model.vocab_size > manifest.vocab_size
    if manifest.vocab_size != config.model.vocab_size and not wider:
        raise ConfigError(
            f"model.vocab_size = {config.model.vocab_size}, but the tokenizer of {path} has"
            f" {manifest.vocab_size} tokens; set model.vocab_size={manifest.vocab_size}"
        )
    for name in config.objective.domain_weights:
        if name not in manifest.domains:
            raise ConfigError(
                f"objective.domain_weights names domain {name!r}; {path} has"
                f" {', '.join(manifest.domains)}"
            )
