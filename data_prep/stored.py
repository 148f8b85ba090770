"""Files of a finished dataset: the shards that its indices name, verified, and their sequences."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from data_prep.format import DatasetManifest
from data_prep.streaming_compat import import_streaming
from nextpt.base.errors import DataPrepError
from nextpt.base.files import sha256_file


@dataclass(frozen=True)
class StoredShard:
    """One shard file, compressed or not.

    Attributes:
        folder: Folder of its index.json.
        name: Path below it.
        bytes: Size of the file.
        xxh64: Hash of the file.
        entry: Its entry in index.json.
    """

    folder: Path
    name: str
    bytes: int
    xxh64: str
    entry: dict[str, Any]

    @property
    def path(self) -> Path:
        """Path of the file."""
        return self.folder / self.name


def shards_of(root: Path, manifest: DatasetManifest, split: str, domain: str) -> list[StoredShard]:
    """List the shards of one domain of one split, in order.

    There are none where it has no sequences. Shards are not read.

    Raises:
        DataPrepError: When the index is not the one of the manifest, names a file outside its
            folder or without a hash, or when a shard is missing or of another size.
    """
    counts = manifest.splits[split][domain]
    folder = root / manifest.split_folder(split) / domain
    if not counts.sequences:
        return []
    index = folder / "index.json"
    if not index.is_file() or sha256_file(index) != counts.index_sha256:
        raise DataPrepError(
            f"{index} is missing or not the one that dataset.json was written with; prepare the"
            " data again or copy it anew"
        )
    shards = [
        _shard(folder, entry) for entry in json.loads(index.read_text(encoding="utf-8"))["shards"]
    ]
    for shard in shards:
        size = shard.path.stat().st_size if shard.path.is_file() else None
        if size != shard.bytes:
            state = (
                "is missing"
                if size is None
                else f"has {size:,} bytes, its index says {shard.bytes:,}"
            )
            raise DataPrepError(f"{shard.path} {state}; prepare the data again or copy it anew")
    return shards


def read_sequences(shard: StoredShard) -> Iterator[dict[str, Any]]:
    """Yield the sequences of a shard, as mosaicml-streaming decodes them.

    Raises:
        DataPrepError: When its hash differs.
    """
    decompress = import_streaming("streaming.base.compression").decompress
    reader_from_json = import_streaming("streaming.base.format").reader_from_json
    data = shard.path.read_bytes()
    if xxhash.xxh64_hexdigest(data) != shard.xxh64:
        raise DataPrepError(
            f"{shard.path} is damaged: its xxh64 differs from the one in index.json; prepare the"
            " data again or copy it anew"
        )
    compression = shard.entry["compression"]
    if compression is None:
        yield from reader_from_json(str(shard.folder), None, shard.entry)
        return
    with tempfile.TemporaryDirectory(prefix="nextpt-shard-") as folder:
        raw = Path(folder) / shard.entry["raw_data"]["basename"]
        raw.parent.mkdir(parents=True, exist_ok=True)
        raw.write_bytes(decompress(compression, data))
        yield from reader_from_json(folder, None, shard.entry)


def _shard(folder: Path, entry: dict[str, Any]) -> StoredShard:
    stored = entry["raw_data"] if entry["compression"] is None else entry["zip_data"]
    name = stored["basename"]
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataPrepError(f"{folder}/index.json names a file outside its folder: {name}")
    if "xxh64" not in stored["hashes"]:
        raise DataPrepError(f"{folder}/index.json has no xxh64 for {name}; prepare the data again")
    return StoredShard(folder, name, stored["bytes"], stored["hashes"]["xxh64"], entry)
