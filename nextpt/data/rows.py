"""Reading rows of MDS shards, verified.

Shards are read with mosaicml-streaming's reader, row by row and in any order; the order is ours (order.py). Each shard
is hashed once per process before its first row is used, also when it lies on a local disk.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_prep.errors import PrepError
from data_prep.files import sha256_file
from data_prep.format import DatasetManifest, columns
from data_prep.streaming_compat import import_streaming
from nextpt.data.batch import Row
from nextpt.errors import DataError

OPTIONAL_COLUMNS = {"token_weights"}


def load_manifest(path: str | Path) -> DatasetManifest:
    """The manifest of a dataset folder. Raises DataError that names the file and the way out."""
    try:
        return DatasetManifest.load(Path(path))
    except PrepError as error:
        raise DataError(str(error)) from None


def load_token_bytes(path: str | Path, vocab_size: int) -> np.ndarray:
    """int64 [V]: UTF-8 bytes of each token, 0 for special ones."""
    file = Path(path) / "token_bytes.npy"
    try:
        sizes = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}; prepare the data again") from None
    if sizes.shape != (vocab_size,):
        raise DataError(f"{file} has shape {sizes.shape}, expected ({vocab_size},); prepare the data again")
    return sizes.astype(np.int64)


class DomainRows:
    """The rows of one domain of one split. `len(rows)` rows; `rows[i]` reads one. Safe to use from one thread."""

    def __init__(self, root: Path, manifest: DatasetManifest, split: str, domain: str) -> None:
        import_streaming()
        from streaming.base.format import reader_from_json

        self.counts = manifest.splits[split][domain]
        self.folder = root / split / domain
        self._domain = manifest.domains.index(domain)
        shards = self._index() if self.counts.rows else []
        for shard in shards:
            self._check(shard, manifest)
        self._hashes = [shard["raw_data"]["hashes"]["xxh64"] for shard in shards]
        self._names = [shard["raw_data"]["basename"] for shard in shards]
        self._readers = [reader_from_json(str(self.folder), None, shard) for shard in shards]
        self._starts = np.cumsum([0] + [shard["samples"] for shard in shards])
        if int(self._starts[-1]) != self.counts.rows:
            raise DataError(f"{self.folder}: {self._starts[-1]} rows in index.json, {self.counts.rows} in dataset.json")
        self._verified: set[int] = set()

    def _index(self) -> list[dict[str, Any]]:
        path = self.folder / "index.json"
        if not path.is_file():
            raise DataError(f"{path} is missing; prepare the data again")
        if sha256_file(path) != self.counts.index_sha256:
            raise DataError(f"{path} is not the one that dataset.json was written with (its hash differs); prepare the data again")
        return json.loads(path.read_text(encoding="utf-8"))["shards"]

    def _check(self, shard: dict[str, Any], manifest: DatasetManifest) -> None:
        """The columns must be those of the format, and the file must lie in this folder."""
        found = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
        wanted = columns(manifest.sequence_length, manifest.vocab_size, manifest.byte_counts)
        kept = {name: kind for name, kind in found.items() if name not in OPTIONAL_COLUMNS}
        if kept != wanted:
            raise DataError(f"{self.folder}: columns {kept}, expected {wanted}")
        basename = shard["raw_data"]["basename"]
        if Path(basename).is_absolute() or ".." in Path(basename).parts:
            raise DataError(f"{self.folder}/index.json names a file outside its folder: {basename}")
        if "xxh64" not in shard["raw_data"].get("hashes", {}):
            raise DataError(f"{self.folder}/{basename} has no xxh64 hash in its index; prepare the data again")

    def __len__(self) -> int:
        return self.counts.rows

    def __getitem__(self, index: int) -> Row:
        """Row `index`. Raises DataError when its shard is missing or damaged, IndexError past the end."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        if shard not in self._verified:
            self._verify(shard)
        try:
            sample = self._readers[shard][index - int(self._starts[shard])]
        except OSError as error:
            raise DataError(f"{self.folder / self._names[shard]}: {error.strerror or error}") from error
        return Row(sample["tokens"], sample["doc_lens"], sample["doc_flags"], self._domain, sample.get("token_weights"))

    def _verify(self, shard: int) -> None:
        path = self.folder / self._names[shard]
        digest = xxhash.xxh64()
        try:
            with open(path, "rb") as file:
                while block := file.read(2**22):
                    digest.update(block)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}; prepare the data again") from error
        if digest.hexdigest() != self._hashes[shard]:
            raise DataError(f"{path} is damaged: its xxh64 differs from the one in index.json; prepare the data again or copy it anew")
        self._verified.add(shard)
