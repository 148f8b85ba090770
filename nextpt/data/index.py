"""Shard index of one domain of one split: shards and hashes, checked against the manifest.

An index of 10^5 shards is 50 MB of JSON. Its shards are decoded one by one into arrays, which takes
half a second and no more memory than the text.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.format import DatasetManifest, columns
from nextpt.base.errors import DataError

_SPACE = " \t\r\n,"
_PART = r"(?!\.{1,2}(?:/|$))[^/\\\0]+"  # of a path: not empty, . or ..
_NAME = re.compile(f"{_PART}(?:/{_PART})*")


@dataclass(frozen=True)
class ShardFile:
    """A file of a shard.

    Attributes:
        name: Path below the domain's folder.
        bytes: Size.
        xxh64: Hash of its bytes.
    """

    name: str
    bytes: int
    xxh64: int


@dataclass(frozen=True)
class Shard:
    """A shard.

    Attributes:
        raw: The file that is read.
        compressed: Its zstd form, where the dataset is compressed.
        count: Its sequences.
    """

    raw: ShardFile
    compressed: ShardFile | None
    count: int


class _ShardNumbers:
    """Numbers of all shards, 8 bytes each."""

    def __init__(self) -> None:
        self.counts = array("Q")
        self.bytes = array("Q")
        self.xxh64 = array("Q")
        self.compressed_bytes = array("Q")
        self.compressed_xxh64 = array("Q")


class ShardIndex:
    """Shards 0..len-1 of the folder DATA/SPLIT/DOMAIN.

    Attributes:
        counts: Sequences of each shard, int64 [shards].
        bytes: Bytes of each raw file, int64 [shards].
        compressed_bytes: Bytes of each compressed file, 0 where there is none, int64 [shards].
        columns: Name -> (encoding, bytes or None), as stored.

    Raises:
        DataError: index.json is missing, damaged, not the one of the manifest, or names a file that
            it must not.
    """

    def __init__(self, root: Path, manifest: DatasetManifest, split: str, domain: str) -> None:
        self.folder = root / manifest.split_folder(split) / domain
        self.path = self.folder / "index.json"
        self.columns: dict[str, tuple[str, int | None]] = {}
        self._layout: tuple[Any, ...] = ()
        self._names: list[str] = []
        self._compressed_names: list[str] = []
        numbers = _ShardNumbers()
        recorded = manifest.splits[split][domain]
        if recorded.sequences:
            required = columns(manifest.sequence_length, manifest.vocab_size, manifest.byte_counts)
            weights = {"token_weights": f"ndarray:float32:{manifest.sequence_length + 1}"}
            self._valid_columns = (required, required | weights)
            for shard in self._decode_shards(self._read(recorded.index_sha256)):
                self._add(shard, numbers)
        self.counts = np.array(numbers.counts, np.int64)
        self.bytes = np.array(numbers.bytes, np.int64)
        self.compressed_bytes = np.array(numbers.compressed_bytes, np.int64)
        self._hashes = numbers.xxh64
        self._compressed_hashes = numbers.compressed_xxh64
        if int(self.counts.sum()) != recorded.sequences:
            raise DataError(
                f"{self.folder}: {self.counts.sum()} sequences in index.json,"
                f" {recorded.sequences} in dataset.json; prepare the data again"
            )

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, number: int) -> Shard:
        raw = ShardFile(self._names[number], int(self.bytes[number]), self._hashes[number])
        compressed = None
        if name := self._compressed_names[number]:
            size, xxh64 = int(self.compressed_bytes[number]), self._compressed_hashes[number]
            compressed = ShardFile(name, size, xxh64)
        return Shard(raw, compressed, int(self.counts[number]))

    @property
    def is_compressed(self) -> bool:
        """Whether any shard has a compressed form."""
        return any(self._compressed_names)

    def names(self) -> set[str]:
        """Names of all files of the shards."""
        return {name for name in (*self._names, *self._compressed_names) if name}

    def _read(self, expected: str) -> str:
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise DataError(
                f"{self.path}: {error.strerror or error}; prepare the data again or copy it anew"
            ) from None
        if sha256(data).hexdigest() != expected:
            raise DataError(
                f"{self.path} is not the one that dataset.json was written with (its hash differs);"
                " prepare the data again"
            )
        return data.decode()

    def _decode_shards(self, text: str) -> Iterator[Any]:
        """Decode the items of `shards` one by one; all at once take five times the memory."""
        decode = json.JSONDecoder().raw_decode
        try:
            at = text.index("[", text.index('"shards"')) + 1
            while True:
                while text[at] in _SPACE:
                    at += 1
                if text[at] == "]":
                    return
                shard, at = decode(text, at)
                yield shard
        except (ValueError, IndexError) as error:
            raise DataError(f"{self.path} is damaged: {error}; prepare the data again") from None

    def _add(self, shard: dict[str, Any], numbers: _ShardNumbers) -> None:
        try:
            layout = (
                shard["format"],
                shard["version"],
                shard["column_names"],
                shard["column_encodings"],
                shard["column_sizes"],
                shard["compression"],
            )
            if layout != self._layout:
                self._check_layout(*layout)
                self._layout = layout
            raw, compressed = shard["raw_data"], shard["zip_data"]
            self._names.append(self._name(raw))
            self._compressed_names.append(self._name(compressed) if compressed else "")
            numbers.counts.append(shard["samples"])
            numbers.bytes.append(raw["bytes"])
            numbers.xxh64.append(int(raw["hashes"]["xxh64"], 16))
            numbers.compressed_bytes.append(compressed["bytes"] if compressed else 0)
            numbers.compressed_xxh64.append(
                int(compressed["hashes"]["xxh64"], 16) if compressed else 0
            )
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise DataError(
                f"{self.path} is damaged: {type(error).__name__} {error}; prepare the data again"
            ) from None

    def _check_layout(
        self,
        kind: str,
        version: int,
        names: list[str],
        encodings: list[str],
        sizes: list[int | None],
        compression: str | None,
    ) -> None:
        stored = dict(zip(names, encodings, strict=True))
        if kind != "mds" or version != 2 or stored not in self._valid_columns:
            raise DataError(
                f"{self.path}: columns {stored} in {kind} version {version}, expected"
                f" {self._valid_columns[0]} in mds version 2; prepare the data again"
            )
        described = {n: (e, s) for n, e, s in zip(names, encodings, sizes, strict=True)}
        if self.columns and described != self.columns:
            raise DataError(
                f"{self.path}: its shards have different columns; prepare the data again"
            )
        self.columns = described
        if compression and compression.partition(":")[0] != "zstd":
            raise DataError(
                f"{self.path}: compression {compression} is not supported; write the shards with"
                " zstd"
            )

    def _name(self, info: dict[str, Any]) -> str:
        name: str = info["basename"]
        if not _NAME.fullmatch(name):
            raise DataError(
                f"{self.path} names a file outside its folder: {name!r}; prepare the data again"
            )
        if "xxh64" not in info.get("hashes", {}):
            raise DataError(
                f"{self.folder}/{name} has no xxh64 hash in its index; prepare the data again"
            )
        return name


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a file that lies outside `folder` through a symbolic link. Raises DataError."""
    real = os.path.realpath(path)
    if not real.startswith(os.path.realpath(folder) + os.sep):
        raise DataError(f"{path} leads outside its folder, to {real}; put the file itself there")
