"""Dataset of a run: manifest, token table, and the sequences of every domain of both splits."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

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
    """The dataset of a config, fetched first if it is remote.

    Args:
        config: The run.
        job_start: When the job started, seconds since 1970 by this machine's clock; with
            data.verify = job, shards that were verified before are verified again.

    Attributes:
        manifest: dataset.json.
        domains: Names of the domains.
        token_bytes: UTF-8 bytes of each token, int32 [V].
        sequences: Split -> one source per domain.
        shard_sizes: Per domain the training sequences of each shard, int64 [shards].

    Raises:
        ConfigError: It is not the dataset that the config describes.
        DataError: It is missing or damaged.
    """

    def __init__(self, config: Config, job_start: float = 0.0) -> None:
        root, data = Path(config.data.path), config.data
        scratch = ScratchFolder(data.scratch)
        remote = RemoteDataset(data.remote, root) if data.remote else None
        if remote:
            remote.fetch_dataset(scratch)
        self.manifest = load_manifest(root)
        check_dataset(config, self.manifest)
        self.domains = self.manifest.domains
        self.token_bytes = load_token_bytes(
            root, self.manifest.vocab_size, self.manifest.token_bytes_sha256
        )
        limit = int(data.cache_limit_gib * 2**30) if data.cache_limit_gib else None
        cache = ShardCache(scratch, limit)
        self.threads = ThreadPoolExecutor(SHARD_THREADS, thread_name_prefix="shards")
        self._stores = {
            split: [
                ShardStore(
                    ShardIndex(root, self.manifest, split, domain),
                    f"{self.manifest.split_folder(split)}/{domain}",
                    scratch,
                    remote,
                    cache,
                    job_start if data.verify == "job" else 0.0,
                )
                for domain in self.domains
            ]
            for split in SPLITS
        }
        self.sequences: dict[str, list[SequenceSource]] = {}
        if data.backend == "native":
            cache.check(self._window_bytes())
            for split, stores in self._stores.items():
                self.sequences[split] = [
                    MappedSequences(store, d, self.threads) for d, store in enumerate(stores)
                ]
        else:
            remove_stale(
                [str(store.folder) for stores in self._stores.values() for store in stores]
            )
            for split, stores in self._stores.items():
                self.sequences[split] = [*open_streaming_sequences(config, stores)]
        self.shard_sizes: list[npt.NDArray[np.int64]] = [
            store.index.counts for store in self._stores["train"]
        ]

    def max_segments(self) -> int | None:
        """Most segments of any sequence; None where the manifest does not have it."""
        most = 0
        for domains in self.manifest.splits.values():
            for counts in domains.values():
                if counts.sequences and counts.max_segments is None:
                    return None
                if counts.sequences:
                    most = max(most, counts.max_segments or 0)
        return most or None

    def close(self) -> None:
        """Stop preparing shards."""
        self.threads.shutdown(wait=False, cancel_futures=True)

    def _window_bytes(self) -> int:
        """Bytes of the largest shards that two windows of every domain can have.

        Compressed forms count too: they lie beside the raw files while they are unpacked.
        """
        total = 0
        for store in self._stores["train"]:
            sizes = np.sort(store.index.bytes + store.index.compressed_bytes)
            total += int(sizes[-2 * WINDOW :].sum())
        return total


def open_sequences(root: Path, split: str) -> dict[str, MappedSequences]:
    """Open a split of a dataset folder of this machine, without a run.

    Args:
        root: Dataset folder.
        split: One of data_prep.format.SPLITS.

    Returns:
        Domain -> its sequences in stored order.

    Raises:
        DataError: The dataset is missing or damaged.
    """
    manifest, scratch, now = load_manifest(root), ScratchFolder(), time.time()
    cache = ShardCache(scratch, None)
    # Nothing is prepared ahead, so no thread ever starts.
    threads = ThreadPoolExecutor(SHARD_THREADS, thread_name_prefix="shards")
    sequences = {}
    for number, domain in enumerate(manifest.domains):
        index = ShardIndex(root, manifest, split, domain)
        name = f"{manifest.split_folder(split)}/{domain}"
        store = ShardStore(index, name, scratch, None, cache, verified_since=now)
        sequences[domain] = MappedSequences(store, number, threads)
    return sequences


def check_dataset(config: Config, manifest: DatasetManifest) -> None:
    """Check that the dataset fits the config. `plan.build_plan` checks the mixtures.

    Raises:
        ConfigError: It does not.
    """
    path, data = config.data.path, config.data
    if manifest.sequence_length != data.sequence_length:
        raise ConfigError(
            f"data.sequence_length = {data.sequence_length}, but the sequences of {path} have"
            f" {manifest.sequence_length} inputs; change the key or prepare the data again"
        )
    # Published models have more embeddings than their tokenizers have tokens, for even shapes;
    # elsewhere it is an error.
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
