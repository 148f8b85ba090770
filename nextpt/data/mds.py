"""Reading rows of one MDS shard through a memory map.

The file (mosaicml-streaming, format/mds/writer.py), all little-endian:

    uint32 samples | uint32 offset[samples + 1], from the file's start | JSON of the writer's settings | the samples
    sample = uint32 bytes of each column without a fixed size | the columns' bytes in order of their names
    ndarray without a shape = uint8 (dimensions << 2 | log2 of the shape's item size) | shape | items
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nextpt.data.batch import Row
from nextpt.errors import DataError

_SCALARS = ("uint16", "uint32")


class MappedShard:
    """The rows of a shard whose bytes were verified. columns: name -> (encoding, bytes or None), sorted as stored.

    domain: what rows are labelled with. No descriptor stays open; the map goes when the last row of it does.
    Raises DataError when the file is not laid out as the index says, FileNotFoundError when it is gone.
    """

    def __init__(self, path: Path, samples: int, columns: dict[str, tuple[str, int | None]], domain: int) -> None:
        self.path, self.samples, self._domain = path, samples, domain
        size = os.stat(path).st_size
        if size < 8:
            raise self._damaged(f"{size} bytes are no shard")
        try:
            # Python's mmap keeps a descriptor for as long as the map lives (until 3.13); torch's does not.
            self._bytes = memoryview(torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy())
        except RuntimeError:
            raise FileNotFoundError(errno.ENOENT, "it cannot be mapped", str(path)) from None
        self._check(size, columns)
        self._fixed = [size for _, size in columns.values()]
        self._open = sum(size is None for size in self._fixed)
        self._columns = [(name, encoding, size) for name, (encoding, size) in columns.items()]
        self._read: list[Callable[[int, int], Any]] = [_reader(self._bytes, encoding) for _, encoding, _ in self._columns]

    def _check(self, size: int, columns: dict[str, tuple[str, int | None]]) -> None:
        found = int.from_bytes(self._bytes[:4], "little")
        head = 4 * (found + 2)
        if found != self.samples or size < head:
            raise self._damaged(f"it says {found} rows, its index {self.samples}")
        self._offsets = np.frombuffer(self._bytes, "<u4", self.samples + 1, 4).astype(np.int64)
        if self._offsets[0] < head or self._offsets[-1] != size or (np.diff(self._offsets) <= 0).any():
            raise self._damaged(f"its offsets do not fit its {size} bytes")
        try:
            settings = json.loads(bytes(self._bytes[head : int(self._offsets[0])]))
            own = dict(zip(settings["column_names"], zip(settings["column_encodings"], settings["column_sizes"], strict=True), strict=True))
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(f"its settings cannot be read ({error})") from None
        if own != columns or list(columns) != sorted(columns):
            raise self._damaged(f"its columns are {own}")

    def _damaged(self, why: str) -> DataError:
        return DataError(f"{self.path} is damaged: {why}; prepare the data again or copy it anew")

    def row(self, number: int) -> Row:
        """Row `number`; its arrays are views of the file."""
        at, end = int(self._offsets[number]), int(self._offsets[number + 1])
        head, found = at, {}
        at += 4 * self._open
        for (name, _, size), read in zip(self._columns, self._read, strict=True):
            if size is None:
                size = int.from_bytes(self._bytes[head : head + 4], "little")
                head += 4
            if at + size > end:
                raise self._damaged(f"row {number} is longer than its place")
            found[name] = read(at, size)
            at += size
        return Row(found["tokens"], found["doc_lens"], found["doc_flags"], self._domain, found.get("token_weights"), found.get("target_bytes"))


def _reader(data: memoryview, encoding: str) -> Callable[[int, int], Any]:
    """A function (offset, bytes) -> the value of a column with this encoding."""
    if encoding in _SCALARS:
        return lambda at, size: None  # domain and text_bytes say what the batch finds out itself
    kind, dtype, *shape = encoding.split(":")
    assert kind == "ndarray", encoding
    item = np.dtype(dtype)
    if shape:
        return lambda at, size: np.frombuffer(data, item, size // item.itemsize, at)

    def read(at: int, size: int) -> np.ndarray:
        head = 1 + (1 << (data[at] & 3))
        return np.frombuffer(data, item, (size - head) // item.itemsize, at + head)

    return read
