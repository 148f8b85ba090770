"""The index of one domain of one split: its shards and their hashes, checked against the manifest.

An index of 10^5 shards is 50 MB of JSON. Its shards are decoded one by one into arrays, so that it takes half a second
and no more memory than the text.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_prep.format import DatasetManifest, columns
from nextpt.errors import DataError

_SPACE = " \t\r\n,"


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

    Raises DataError when index.json is missing, damaged, not the one of the manifest, or names what it must not.
    """

    def __init__(self, root: Path, manifest: DatasetManifest, split: str, domain: str) -> None:
        self.folder = root / split / domain
        self.path = self.folder / "index.json"
        self.columns: dict[str, tuple[str, int | None]] = {}
        self._names: list[str] = []
        self._packed_names: list[str] = []
        self._numbers: list[tuple[int, ...]] = []
        counts = manifest.splits[split][domain]
        if counts.rows:
            text = self._read(counts.index_sha256)
            wanted = columns(manifest.sequence_length, manifest.vocab_size, manifest.byte_counts)
            wanted_or_weighted = (wanted, wanted | {"token_weights": f"ndarray:float32:{manifest.sequence_length + 1}"})
            for shard in self._shards(text):
                self._add(shard, wanted_or_weighted)
        numbers = np.array(self._numbers, dtype=np.uint64).reshape(-1, 5)
        self.samples = numbers[:, 0].astype(np.int64)
        self.bytes, self.packed_bytes = numbers[:, 1].astype(np.int64), numbers[:, 3].astype(np.int64)
        self._hashes, self._packed_hashes = numbers[:, 2], numbers[:, 4]
        del self._numbers
        if int(self.samples.sum()) != counts.rows:
            raise DataError(f"{self.folder}: {self.samples.sum()} rows in index.json, {counts.rows} in dataset.json; prepare the data again")

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, number: int) -> Shard:
        raw = File(self._names[number], int(self.bytes[number]), int(self._hashes[number]))
        name = self._packed_names[number] if self._packed_names else ""
        packed = File(name, int(self.packed_bytes[number]), int(self._packed_hashes[number])) if name else None
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
            raise DataError(f"{self.path}: {error.strerror or error}; prepare the data again or copy it anew") from None
        if sha256(data).hexdigest() != expected:
            raise DataError(f"{self.path} is not the one that dataset.json was written with (its hash differs); prepare the data again")
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

    def _add(self, shard: dict[str, Any], wanted: tuple[dict[str, str], ...]) -> None:
        try:
            found = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
            if shard["format"] != "mds" or shard["version"] != 2 or found not in wanted:
                raise DataError(f"{self.path}: columns {found} in {shard['format']} version {shard['version']}, expected {wanted[0]} in mds version 2; "
                                "prepare the data again")
            described = {n: (e, s) for n, e, s in zip(shard["column_names"], shard["column_encodings"], shard["column_sizes"], strict=True)}
            if self.columns and described != self.columns:
                raise DataError(f"{self.path}: its shards have different columns; prepare the data again")
            self.columns = described
            raw, packed = self._file(shard["raw_data"]), self._file(shard["zip_data"]) if shard["zip_data"] else None
            if packed and str(shard["compression"]).partition(":")[0] != "zstd":
                raise DataError(f"{self.path}: compression {shard['compression']} is not read; write the shards with zstd")
            numbers = (int(shard["samples"]), raw.bytes, raw.xxh64, *((packed.bytes, packed.xxh64) if packed else (0, 0)))
            if not all(0 <= number < 2**64 for number in numbers):
                raise ValueError(f"samples, bytes and hashes {numbers}")
            self._numbers.append(numbers)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{self.path} is damaged: {type(error).__name__} {error}; prepare the data again") from None
        self._names.append(raw.name)
        self._packed_names.append(packed.name if packed else "")

    def _file(self, info: dict[str, Any]) -> File:
        name = info["basename"]
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts or str(place) != name or "\\" in name or "\0" in name or not name or name == ".":
            raise DataError(f"{self.path} names a file outside its folder: {name!r}")
        if "xxh64" not in info.get("hashes", {}):
            raise DataError(f"{self.folder}/{name} has no xxh64 hash in its index; prepare the data again")
        return File(name, int(info["bytes"]), int(info["hashes"]["xxh64"], 16))


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a file that is elsewhere through a symbolic link. Raises DataError."""
    real = os.path.realpath(path)
    if not real.startswith(os.path.realpath(folder) + os.sep):
        raise DataError(f"{path} leads outside its folder, to {real}; put the file itself there")
