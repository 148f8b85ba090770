"""Datasets in the layout of large preparations: group folders, compression, more columns."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.format import SPLITS, columns
from data_prep.streaming_compat import import_streaming
from nextpt.base.files import canonical_json, sha256_file
from nextpt.data.index import ShardIndex
from nextpt.data.scratch import ScratchFolder
from nextpt.data.sequences import MappedSequences, load_manifest
from nextpt.data.store import ShardCache, ShardStore

Sample = dict[str, Any]
SMALL = ("dataset.json", "tokenizer.json", "token_bytes.npy")


def samples_of(dataset: Path, split: str, domain: str) -> Iterator[Sample]:
    """Sequences of a domain as streaming's own local reader returns them, in index order."""
    import_streaming()
    from streaming import LocalDataset

    folder = dataset / split / domain
    if folder.is_dir():
        local = LocalDataset(local=str(folder))
        yield from (local[i] for i in range(len(local)))


def rewrite(
    dataset: Path,
    folder: Path,
    *,
    compression: str | None = None,
    shard_sequences: int = 16,
    group_shards: int = 20,
    byte_counts: str = "table",
    extra: dict[str, str] | None = None,
    change: Callable[[Sample], Sample] = lambda s: s,
    shared_index: bool = True,
) -> Path:
    """Write the sequences of `dataset` to `folder` in small shards.

    Args:
        dataset: The dataset to read.
        folder: Where to write.
        compression: MDS compression of the shards; None for none.
        shard_sequences: Sequences of a shard.
        group_shards: Shards of a group folder.
        byte_counts: Layout of the byte counts, see `data_prep.format.columns`.
        extra: Further columns, name -> MDS encoding.
        change: Fills the columns byte_counts and extra of each sequence.
        shared_index: Write an index of all groups beside theirs.
    """
    import_streaming()
    from streaming import MDSWriter

    manifest, raw = load_manifest(dataset), json.loads((dataset / "dataset.json").read_text())
    layout = columns(manifest.sequence_length, manifest.vocab_size, byte_counts) | (extra or {})
    for split in SPLITS:
        for domain in manifest.domains:
            home, shards = folder / split / domain, []
            samples = [change(s) for s in samples_of(dataset, split, domain)]
            size = shard_sequences * group_shards
            limit = max((len(_encoded(s)) for s in samples), default=0) * shard_sequences + 2000
            for group, first in enumerate(range(0, len(samples), size)):
                name = f"g{group:05d}"
                writer = MDSWriter(
                    columns=layout,
                    out=str(home / name),
                    hashes=["xxh64"],
                    compression=compression,
                    size_limit=limit,
                )
                for sample in samples[first : first + size]:
                    writer.write(sample)
                writer.finish()
                for shard in json.loads((home / name / "index.json").read_text())["shards"]:
                    for part in ("raw_data", "zip_data"):
                        if shard[part]:
                            shard[part]["basename"] = f"{name}/{shard[part]['basename']}"
                    shards.append(shard)
                (home / name / "index.json").unlink()
            home.mkdir(parents=True, exist_ok=True)
            set_index(folder, raw, split, domain, {"shards": shards, "version": 2})
    for name in SMALL[1:]:
        shutil.copyfile(dataset / name, folder / name)
    shutil.copytree(dataset / "validation_text", folder / "validation_text")
    raw |= {"byte_counts": byte_counts}
    write_manifest(folder, raw)
    return folder


def _encoded(sample: Sample) -> bytes:
    return b"".join(np.asarray(value).tobytes() + b"        " for value in sample.values())


def set_index(
    folder: Path, manifest: dict[str, Any], split: str, domain: str, index: dict[str, Any]
) -> None:
    """Write an index and note its hash in the manifest's dict."""
    path = folder / split / domain / "index.json"
    path.write_text(json.dumps(index, sort_keys=True))
    manifest["splits"][split][domain]["index_sha256"] = sha256_file(path)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """dataset.json, with a fingerprint that follows from the rest."""
    import hashlib

    rest = canonical_json({k: v for k, v in manifest.items() if k != "fingerprint"})
    (folder / "dataset.json").write_text(
        canonical_json(manifest | {"fingerprint": hashlib.sha256(rest.encode()).hexdigest()})
    )


def edit_index(
    folder: Path, split: str, domain: str, change: Callable[[dict[str, Any]], Any]
) -> None:
    """Change an index and update its hashes, as an attacker would."""
    raw = json.loads((folder / "dataset.json").read_text())
    index = json.loads((folder / split / domain / "index.json").read_text())
    change(index)
    set_index(folder, raw, split, domain, index)
    write_manifest(folder, raw)


def store_of(dataset: Path, split: str, domain: str, scratch: Path | None = None) -> ShardStore:
    node = ScratchFolder(scratch)
    return ShardStore(
        ShardIndex(dataset, load_manifest(dataset), split, domain),
        f"{split}/{domain}",
        node,
        None,
        ShardCache(node, None),
    )


def sequences_of(
    dataset: Path, split: str, domain: str, scratch: Path | None = None
) -> MappedSequences:
    """The sequences of a domain of a local dataset, by our own reader."""
    manifest = load_manifest(dataset)
    return MappedSequences(
        store_of(dataset, split, domain, scratch),
        manifest.domains.index(domain),
        ThreadPoolExecutor(1),
    )
