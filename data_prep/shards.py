"""Packing the documents of one domain and split into rows, and writing the rows as MDS shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_prep.files import sha256_file
from data_prep.format import ENDS_MID_DOCUMENT, PADDING, STARTS_MID_DOCUMENT, SplitCounts, columns
from data_prep.pack import best_fit_decreasing, shuffled, split_long
from data_prep.streaming_compat import import_streaming

SHARD_BYTES = 2**26  # MDS's own default: large enough to stream, small enough to hash at once


class PackedSplit:
    """Collects tokenized documents, cut into pieces that fit a row. sizes: uint16 [V], UTF-8 bytes of each token."""

    def __init__(self, sequence_length: int, pad_id: int, sizes: np.ndarray) -> None:
        self.capacity, self.pad_id, self.sizes = sequence_length + 1, pad_id, sizes
        self.pieces: list[np.ndarray] = []
        self.flags: list[int] = []
        self.documents = self.bytes = 0

    def add(self, tokens: np.ndarray, size: int) -> None:
        """tokens: uint32 [start, ..., end] of one document; size: its UTF-8 bytes."""
        for start, stop in split_long(len(tokens), self.capacity):
            self.pieces.append(tokens[start:stop])
            self.flags.append(STARTS_MID_DOCUMENT * (start > 0) | ENDS_MID_DOCUMENT * (stop < len(tokens)))
        self.documents += 1
        self.bytes += size

    def rows(self, seed: int, stream: int) -> list[list[int]]:
        """Rows as lists of pieces, in shuffled order: best-fit makes rows of long documents first."""
        packed = best_fit_decreasing(np.array([len(p) for p in self.pieces], dtype=np.int64), self.capacity)
        return [packed[i] for i in shuffled(len(packed), seed, stream)]

    def sample(self, row: list[int], domain: int, dtype: np.dtype) -> dict[str, object]:
        """One MDS sample (columns of data_prep.format)."""
        pieces, flags = [self.pieces[i] for i in row], [self.flags[i] for i in row]
        text = sum(int(self.sizes[piece[1:]].sum(dtype=np.int64)) for piece in pieces)
        free = self.capacity - sum(map(len, pieces))
        if free:
            pieces, flags = [*pieces, np.full(free, self.pad_id)], [*flags, PADDING]
        return {
            "tokens": np.concatenate(pieces).astype(dtype),
            "doc_lens": np.array([len(p) for p in pieces], dtype=np.uint32),
            "doc_flags": np.array(flags, dtype=np.uint8),
            "domain": np.uint16(domain),
            "text_bytes": np.uint32(text),
        }


def write_split(split: PackedSplit, folder: Path, domain: int, *, seed: int) -> SplitCounts:
    """Write the rows of one domain and split; returns what was written. A split without documents has no folder."""
    vocab_size = len(split.sizes)
    layout = columns(split.capacity - 1, vocab_size)
    dtype = np.dtype(layout["tokens"].split(":")[1])
    rows = split.rows(seed, domain)
    written = 0
    if rows:
        import_streaming()
        from streaming import MDSWriter

        # Not as a context manager: its __exit__ writes an index also when an exception passes through.
        writer = MDSWriter(columns=layout, out=str(folder), hashes=["xxh64"], size_limit=SHARD_BYTES)
        try:
            for row in rows:
                sample = split.sample(row, domain, dtype)
                written += int(sample["text_bytes"])
                writer.write(sample)
            writer.finish()
        finally:
            writer.executor.shutdown(wait=False)
    assert written == split.bytes, f"{folder}: rows stand for {written} bytes of text, documents for {split.bytes}"
    pieces = split.pieces
    return SplitCounts(
        documents=split.documents,
        bytes=split.bytes,
        tokens=sum(len(p) - 1 for p in pieces),
        text_tokens=sum(int(np.count_nonzero(split.sizes[p[1:]])) for p in pieces),
        rows=len(rows),
        padding_tokens=len(rows) * split.capacity - sum(map(len, pieces)),
        index_sha256=sha256_file(folder / "index.json") if rows else "",
    )
