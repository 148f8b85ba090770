"""Reading rows of one MDS shard through a memory map.

The file (mosaicml-streaming, format/mds/writer.py), all little-endian:

    uint32 samples | uint32 offset[samples + 1], from the file's start | JSON of the writer's
    settings | the samples sample = uint32 bytes of each column without a fixed size | the columns'
    bytes in order of their names ndarray without a shape = uint8 (dimensions << 2 | log2 of the
    shape's item size) | shape | items

Of our columns, doc_flags and doc_lens have no fixed size; their names come first. So all others lie
at fixed places from a sample's end.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path

import numpy as np
import torch

from nextpt.base.errors import DataError
from nextpt.data.batch import StoredSequence

_SIZES = struct.Struct("<II")  # bytes of doc_flags and doc_lens
_OPEN = ["doc_flags", "doc_lens"]
_FLAGS, _LENS = np.dtype("u1"), np.dtype("<u4")


class MappedShard:
    """The rows of a shard whose bytes were verified. columns: name -> (encoding, bytes or None), sorted as stored.

    domain: what rows are labelled with. No descriptor stays open; the map goes when the last row of
    it does. Raises DataError when the file is not laid out as the index says, FileNotFoundError
    when it is gone.
    """

    def __init__(
        self, path: Path, samples: int, columns: dict[str, tuple[str, int | None]], domain: int
    ) -> None:
        self.path, self.samples, self._domain = path, samples, domain
        size = os.stat(path).st_size
        if size < 8:
            raise self._damaged(f"{size} bytes are no shard")
        try:
            # Python's mmap keeps a descriptor for as long as the map lives (until 3.13); torch's
            # does not.
            self._bytes = memoryview(
                torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
            )
        except RuntimeError:
            raise FileNotFoundError(errno.ENOENT, "it cannot be mapped", str(path)) from None
        self._check(size, columns)
        before_end, self._fixed = 0, {}
        for name, (encoding, width) in reversed(columns.items()):
            if width is not None:
                before_end += width
                if encoding.startswith("ndarray:"):
                    item = np.dtype(encoding.split(":")[1])
                    self._fixed[name] = (before_end, item, width // item.itemsize)
        self._tail = before_end
        self._tokens = self._fixed.pop("tokens")
        self._others = list(self._fixed.items())

    def _check(self, size: int, columns: dict[str, tuple[str, int | None]]) -> None:
        found = int.from_bytes(self._bytes[:4], "little")
        head = 4 * (found + 2)
        if found != self.samples or size < head:
            raise self._damaged(f"it says {found} rows, its index {self.samples}")
        offsets = np.frombuffer(self._bytes, "<u4", self.samples + 1, 4).astype(np.int64)
        if offsets[0] < head or offsets[-1] != size or (np.diff(offsets) <= 0).any():
            raise self._damaged(f"its offsets do not fit its {size} bytes")
        self._offsets = self._bytes[4:head].cast("I")  # numbers of it are Python's, without a copy
        try:
            settings = json.loads(bytes(self._bytes[head : self._offsets[0]]))
            own = dict(
                zip(
                    settings["column_names"],
                    zip(settings["column_encodings"], settings["column_sizes"], strict=True),
                    strict=True,
                )
            )
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(f"its settings cannot be read ({error})") from None
        open_ones = [name for name, (_, width) in columns.items() if width is None]
        if (
            own != columns
            or list(columns) != sorted(columns)
            or open_ones != _OPEN
            or list(columns)[:2] != _OPEN
        ):
            raise self._damaged(f"its columns are {own}")

    def _damaged(self, why: str) -> DataError:
        return DataError(f"{self.path} is damaged: {why}; prepare the data again or copy it anew")

    def row(self, number: int) -> StoredSequence:
        """StoredSequence `number`; its arrays are views of the file."""
        data, at, end = self._bytes, self._offsets[number], self._offsets[number + 1]
        flags_size, lens_size = _SIZES.unpack_from(data, at)
        flags_at = at + _SIZES.size
        lens_at = flags_at + flags_size
        if lens_at + lens_size + self._tail != end:
            raise self._damaged(f"the columns of row {number} do not fill its place")
        flags_head, lens_head = 1 + (1 << (data[flags_at] & 3)), 1 + (1 << (data[lens_at] & 3))
        before_end, item, count = self._tokens
        others = (
            {
                name: np.frombuffer(data, kind, n, end - place)
                for name, (place, kind, n) in self._others
            }
            if self._others
            else {}
        )
        return StoredSequence(
            np.frombuffer(data, item, count, end - before_end),
            np.frombuffer(data, _LENS, (lens_size - lens_head) // 4, lens_at + lens_head),
            np.frombuffer(data, _FLAGS, flags_size - flags_head, flags_at + flags_head),
            self._domain,
            **others,
        )
