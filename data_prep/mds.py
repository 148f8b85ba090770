"""MDS shard layout: encoding of variable-size columns, and reading through a memory map.

The file (mosaicml-streaming, format/mds/writer.py), all little-endian::

    shard     uint32 samples | uint32 offset[samples + 1] from the file's start
              | JSON of the writer's settings | the samples
    sample    uint32 size in bytes of each column without a fixed size
              | the columns' bytes, in order of their names
    ndarray   of any shape: uint8 (dimensions << 2 | log2 of the shape's item size)
              | the shape | the items

Of our columns (`data_prep.format.columns`) doc_flags and doc_lens have no fixed size, and their
names come first. So every other column lies at a fixed distance from the end of its sample.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nextpt.base.errors import DataError

_VARIABLE = ["doc_flags", "doc_lens"]  # columns without a fixed size, in order of their names
_SIZES = struct.Struct("<II")  # sizes in bytes of doc_flags and doc_lens
_FLAGS_DTYPE, _LENS_DTYPE = np.dtype("u1"), np.dtype("<u4")


class StoredSequence(NamedTuple):
    """One packed sequence as stored (`data_prep.format`), T + 1 tokens long.

    Attributes:
        tokens: uint16 or uint32 [T + 1].
        doc_lens: uint32 [segments], summing to T + 1.
        doc_flags: uint8 [segments].
        domain: Number of the domain.
        token_weights: float32 [T + 1], or None where the shard has none.
        target_bytes: uint32 [T + 1], or None where token_bytes.npy says it.
    """

    tokens: np.ndarray
    doc_lens: np.ndarray
    doc_flags: np.ndarray
    domain: int
    token_weights: np.ndarray | None = None
    target_bytes: np.ndarray | None = None


def encode_vector(array: np.ndarray) -> bytes:
    """Encode a vector for a column without a fixed shape, as mosaicml-streaming does."""
    log2_size, dtype = next(
        (i, t) for i, t in enumerate(("u1", "<u2", "<u4")) if len(array) < 2 ** (8 << i)
    )
    shape = np.array(array.shape, dtype=dtype)
    return bytes([1 << 2 | log2_size]) + shape.tobytes() + array.tobytes()


class MappedShard:
    """Sequences of one shard file whose hash was verified, read through a memory map.

    No file descriptor stays open; the map is released with the last sequence that views it.

    Args:
        path: The uncompressed shard.
        samples: Number of sequences, by the index.
        columns: Name -> (encoding, bytes or None for a variable size), sorted by name.
        domain: Number of the domain that the sequences are labelled with.

    Raises:
        DataError: When the file is not laid out as the index says.
        FileNotFoundError: When the file is gone.
    """

    def __init__(
        self, path: Path, samples: int, columns: dict[str, tuple[str, int | None]], domain: int
    ) -> None:
        import torch  # not at the top: workers of data_prep import this module and need no torch

        self.path = path
        self.samples = samples
        self._domain = domain
        size = os.stat(path).st_size
        if size < 8:
            raise self._damaged(f"{size} bytes are no shard")
        try:
            # Python's mmap keeps a descriptor for as long as the map lives (until 3.13); torch's
            # does not.
            mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
            self._bytes = mapped.numpy().data
        except RuntimeError:
            raise FileNotFoundError(errno.ENOENT, "it cannot be mapped", str(path)) from None
        self._check(size, columns)
        # Name -> (distance of its begin from the sample's end, dtype, items)
        fixed: dict[str, tuple[int, np.dtype, int]] = {}
        before_end = 0
        for name, (encoding, width) in reversed(columns.items()):
            if width is not None:
                before_end += width
                if encoding.startswith("ndarray:"):
                    item = np.dtype(encoding.split(":")[1])
                    fixed[name] = (before_end, item, width // item.itemsize)
        self._fixed_size = before_end
        self._tokens = fixed.pop("tokens")
        self._optional = list(fixed.items())

    def _check(self, size: int, columns: dict[str, tuple[str, int | None]]) -> None:
        """Compare the head of the file with the index."""
        samples = int.from_bytes(self._bytes[:4], "little")
        head = 4 * (samples + 2)
        if samples != self.samples or size < head:
            raise self._damaged(f"it has {samples} sequences, in its index {self.samples}")
        offsets = np.frombuffer(self._bytes, "<u4", self.samples + 1, 4).astype(np.int64)
        if offsets[0] < head or offsets[-1] != size or (np.diff(offsets) <= 0).any():
            raise self._damaged(f"its offsets do not fit its {size} bytes")
        self._offsets = self._bytes[4:head].cast("I")  # its items are Python ints, without a copy
        try:
            settings = json.loads(bytes(self._bytes[head : self._offsets[0]]))
            own_columns = dict(
                zip(
                    settings["column_names"],
                    zip(settings["column_encodings"], settings["column_sizes"], strict=True),
                    strict=True,
                )
            )
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(f"its settings cannot be read ({error})") from None
        variable = [name for name, (_, width) in columns.items() if width is None]
        if (
            own_columns != columns
            or list(columns) != sorted(columns)
            or variable != _VARIABLE
            or list(columns)[:2] != _VARIABLE
        ):
            raise self._damaged(f"its columns are {own_columns}")

    def _damaged(self, reason: str) -> DataError:
        return DataError(
            f"{self.path} is damaged: {reason}; prepare the data again or copy it anew"
        )

    def sequence(self, number: int) -> StoredSequence:
        """Sequence `number` of the shard; its arrays are views of the file."""
        data, at, end = self._bytes, self._offsets[number], self._offsets[number + 1]
        flags_size, lens_size = _SIZES.unpack_from(data, at)
        flags_at = at + _SIZES.size
        lens_at = flags_at + flags_size
        if lens_at + lens_size + self._fixed_size != end:
            raise self._damaged(f"the columns of sequence {number} do not fill its bytes")
        # One byte for dimensions and item size, then the shape
        flags_head, lens_head = 1 + (1 << (data[flags_at] & 3)), 1 + (1 << (data[lens_at] & 3))
        before_end, item, count = self._tokens
        optional = (
            {
                name: np.frombuffer(data, dtype, items, end - distance)
                for name, (distance, dtype, items) in self._optional
            }
            if self._optional
            else {}
        )
        return StoredSequence(
            np.frombuffer(data, item, count, end - before_end),
            np.frombuffer(data, _LENS_DTYPE, (lens_size - lens_head) // 4, lens_at + lens_head),
            np.frombuffer(data, _FLAGS_DTYPE, flags_size - flags_head, flags_at + flags_head),
            self._domain,
            **optional,
        )
