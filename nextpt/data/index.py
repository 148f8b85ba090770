"""The index of one domain of one split: its shards and their hashes, checked against the manifest.

An index of 10^5 shards is 50 MB of JSON. Its shards are decoded one by one into arrays, so that it
takes half a second and no more memory than the text.
"""

from __future__ import annotations

import json
import os
import re
from array import array
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
class File:
    """A file of a shard. name: path below the domain's folder. xxh64: hash of its bytes."""

    name: str
    bytes: int
    xxh64: int


@dataclass(frozen=True)
class Shard:
    """raw: the shard as it is read. packed: its zstd form, where the dataset is compressed."""

    raw: File
    packed: File | None
    samples: int


class ShardIndex:
    """Shards 0..len-1 of the folder DATA/SPLIT/DOMAIN. samples: int64 [shards]. columns: name -> (encoding, bytes or None), as stored.

    Raises DataError when index.json is missing, damaged, not the one of the manifest, or names what
    it must not.
    """

    def __init__(self, root: Path, manifest: DatasetManifest, split: str, domain: str) -> None:
        self.folder = root / split / domain
        self.path = self.folder / "index.json"
        self.columns: dict[str, tuple[str, int | None]] = {}
        self._layout: tuple[Any, ...] = ()
        self._names: list[str] = []
        self._packed_names: list[str] = []
        numbers = {
            name: array("Q")
            for name in ("samples", "bytes", "xxh64", "packed bytes", "packed xxh64")
        }
        counts = manifest.splits[split][domain]
        if counts.rows:
            wanted = columns(manifest.sequence_length, manifest.vocab_size, manifest.byte_counts)
            self._wanted = (
                wanted,
                wanted | {"token_weights": f"ndarray:float32:{manifest.sequence_length + 1}"},
            )
            for shard in self._shards(self._read(counts.index_sha256)):
                self._add(shard, *numbers.values())
        self.samples, self.bytes, self.packed_bytes = (
            np.array(numbers[n], np.int64) for n in ("samples", "bytes", "packed bytes")
        )
        self._hashes, self._packed_hashes = numbers["xxh64"], numbers["packed xxh64"]
        if int(self.samples.sum()) != counts.rows:
            raise DataError(
                f"{self.folder}: {self.samples.sum()} rows in index.json, {counts.rows} in"
                " dataset.json; prepare the data again"
            )

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, number: int) -> Shard:
        raw = File(self._names[number], int(self.bytes[number]), self._hashes[number])
        name = self._packed_names[number]
        packed = (
            File(name, int(self.packed_bytes[number]), self._packed_hashes[number])
            if name
            else None
        )
        return Shard(raw, packed, int(self.samples[number]))

    @property
    def compressed(self) -> bool:
        return any(self._packed_names)

    def names(self) -> set[str]:
        """Names of all files of the shards."""
        return {name for name in (*self._names, *self._packed_names) if name}

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

    def _shards(self, text: str) -> Any:
        """The dicts of `shards`, one at a time: decoded in one go they take five times the text's memory."""
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

    def _add(
        self,
        shard: dict[str, Any],
        samples: array,
        size: array,
        xxh64: array,
        packed_size: array,
        packed_xxh64: array,
    ) -> None:
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
            raw, packed = shard["raw_data"], shard["zip_data"]
            self._names.append(self._name(raw))
            self._packed_names.append(self._name(packed) if packed else "")
            samples.append(shard["samples"])
            size.append(raw["bytes"])
            xxh64.append(int(raw["hashes"]["xxh64"], 16))
            packed_size.append(packed["bytes"] if packed else 0)
            packed_xxh64.append(int(packed["hashes"]["xxh64"], 16) if packed else 0)
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
        found = dict(zip(names, encodings, strict=True))
        if kind != "mds" or version != 2 or found not in self._wanted:
            raise DataError(
                f"{self.path}: columns {found} in {kind} version {version}, expected"
                f" {self._wanted[0]} in mds version 2; prepare the data again"
            )
        described = {n: (e, s) for n, e, s in zip(names, encodings, sizes, strict=True)}
        if self.columns and described != self.columns:
            raise DataError(
                f"{self.path}: its shards have different columns; prepare the data again"
            )
        self.columns = described
        if compression and compression.partition(":")[0] != "zstd":
            raise DataError(
                f"{self.path}: compression {compression} is not read; write the shards with zstd"
            )

    def _name(self, info: dict[str, Any]) -> str:
        name = info["basename"]
        if not _NAME.fullmatch(name):
            raise DataError(f"{self.path} names a file outside its folder: {name!r}")
        if "xxh64" not in info.get("hashes", {}):
            raise DataError(
                f"{self.folder}/{name} has no xxh64 hash in its index; prepare the data again"
            )
        return name


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a file that is elsewhere through a symbolic link. Raises DataError."""
    real = os.path.realpath(path)
    if not real.startswith(os.path.realpath(folder) + os.sep):
        raise DataError(f"{path} leads outside its folder, to {real}; put the file itself there")
