r"""Export of shards to Megatron-LM's indexed datasets, PREFIX-DOMAIN-SPLIT.bin and .idx.

Layout (megatron/core/datasets/indexed_dataset.py of Megatron-LM), little-endian:

    .bin  the tokens of all sequences, one after the other
    .idx  b"MMIDIDX\0\0", uint64 version 1, uint8 code of the token type (4 int32, 8 uint16),
          uint64 number of sequences n, uint64 entries of the last table,
          int32 [n] lengths in tokens, int64 [n] offsets in bytes,
          int64 [n + 1] sequence at which each document begins, and n

Megatron's GPTDataset shuffles sequences, joins them to one stream and cuts that into samples. So a
sequence of Megatron's is one segment of our sequences: a document or a piece of one. Ours are
shuffled and do not say whose pieces they hold, so the pieces of a document longer than a sequence
stay apart: prepare with long sequences to keep documents whole.

The stream predicts every token from the one before it, so tokens are kept or left out such that
each target of our sequences is predicted from its own predecessor:

- The token that a piece shares with the piece before it is kept. Without it the piece's second
  token would be predicted from some other document.
- A document's start token is left out where it is the same token as the end token: the end of the
  document before does its work, as with preprocess_data.py --append-eod. Both would teach that an
  end is followed by an end. Any other start token is kept.
- Padding is left out.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from rich.console import Console

from data_prep.format import PADDING, STARTS_MID_DOCUMENT, DatasetManifest
from data_prep.progress import byte_progress
from data_prep.stored import StoredShard, read_sequences, shards_of
from nextpt.base.errors import DataPrepError
from nextpt.base.files import atomic_write

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
CODES = {"uint16": 8, "int32": 4}
BLOCK = 2**20  # entries of a table computed at once


@dataclass(frozen=True)
class Exported:
    """One pair of files. prefix: what Megatron takes as --data-path."""

    split: str
    domain: str
    prefix: Path
    sequences: int
    tokens: int


def megatron_dtype(vocab_size: int) -> np.dtype:
    """Token type that Megatron itself chooses (DType.optimal_dtype).

    uint16 below 65500 tokens, else int32.
    """
    if vocab_size > 2**31:
        raise DataPrepError(
            f"a vocabulary of {vocab_size} tokens does not fit int32, the widest token type of"
            " Megatron's files"
        )
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


def export_megatron(data: Path, prefix: Path, console: Console | None = None) -> list[Exported]:
    """Write every domain and split of a dataset that has text; all files appear together or none.

    Uses memory for one shard and one block of a table.

    Raises:
        DataPrepError: When the dataset is incomplete, or files are in the way.
    """
    manifest = DatasetManifest.load(data)
    parts = {
        (split, domain): shards_of(data, manifest, split, domain)
        for split, domains in manifest.splits.items()
        for domain in domains
    }
    parts = {part: shards for part, shards in parts.items() if shards}
    prefixes = {
        (split, domain): prefix.with_name(f"{prefix.name}-{domain}-{split}")
        for split, domain in parts
    }
    for file in (_file(p, suffix) for p in prefixes.values() for suffix in (".bin", ".idx")):
        if file.exists():
            raise DataPrepError(f"{file} exists; give another --output, or remove it")
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with byte_progress(console) as progress, ExitStack() as files:
            task = progress.add_task(
                "exporting", total=sum(s.bytes for shards in parts.values() for s in shards)
            )
            # Files are renamed in reverse order: each index after all tokens.
            indices = {
                part: files.enter_context(atomic_write(_file(p, ".idx"), "w+b"))
                for part, p in prefixes.items()
            }
            tokens = {
                part: files.enter_context(atomic_write(_file(p, ".bin"), "wb"))
                for part, p in prefixes.items()
            }
            exported = []
            for part, shards in parts.items():
                pair = _Pair(tokens[part], indices[part], manifest)
                for shard in shards:
                    pair.add(shard)
                    progress.update(task, advance=shard.bytes)
                pair.finish(*part)
                exported.append(Exported(*part, prefixes[part], pair.sequences, pair.tokens))
    except OSError as error:
        raise DataPrepError(f"{error.filename or prefix}: {error.strerror or error}") from error
    return exported


class _Pair:
    """A .bin and its .idx while they are written.

    Lengths go straight to their position in the .idx; the tables after them follow in `finish`.
    """

    def __init__(self, tokens: IO[bytes], index: IO[bytes], manifest: DatasetManifest) -> None:
        self._tokens_file = tokens
        self._index = index
        self._manifest = manifest
        self._dtype = megatron_dtype(manifest.vocab_size)
        self._drops_starts = manifest.start_id == manifest.end_id
        self.sequences = self.tokens = self._documents = self._continued = 0
        index.write(bytes(HEADER.size))

    def add(self, shard: StoredShard) -> None:
        """Append the segments of a shard."""
        for packed in read_sequences(shard):
            lengths = []
            for sequence, flags in _segments(packed, shard.path):
                self._documents += not flags & STARTS_MID_DOCUMENT
                self._continued += bool(flags & STARTS_MID_DOCUMENT)
                if self._drops_starts and not flags & STARTS_MID_DOCUMENT:
                    sequence = sequence[1:]
                if len(sequence):
                    self._tokens_file.write(sequence.astype(self._dtype).tobytes())
                    lengths.append(len(sequence))
            self._index.write(np.array(lengths, dtype="<i4").tobytes())
            self.sequences += len(lengths)
            self.tokens += sum(lengths)

    def finish(self, split: str, domain: str) -> None:
        """Check the sums, and write the header and the tables of offsets and documents."""
        counts = self._manifest.splits[split][domain]
        expected = counts.tokens + self._continued + (0 if self._drops_starts else counts.documents)
        if (self._documents, self.tokens) != (counts.documents, expected):
            raise DataPrepError(
                f"{split}/{domain} has {self._documents} documents and {self.tokens} tokens to"
                f" export where dataset.json counts {counts.documents} and {expected}; prepare the"
                " data again"
            )
        assert self._tokens_file.tell() == self.tokens * self._dtype.itemsize
        name = {"u": "uint16", "i": "int32"}[self._dtype.kind]
        offset = 0
        for start in range(0, self.sequences, BLOCK):
            self._index.seek(HEADER.size + 4 * start)
            lengths = np.frombuffer(
                self._index.read(4 * min(BLOCK, self.sequences - start)), dtype="<i4"
            ).astype("<i8")
            ends = offset + np.cumsum(lengths) * self._dtype.itemsize
            self._index.seek(0, 2)
            self._index.write((ends - lengths * self._dtype.itemsize).tobytes())
            offset = int(ends[-1])
        for start in range(0, self.sequences + 1, BLOCK):
            self._index.write(
                np.arange(start, min(start + BLOCK, self.sequences + 1), dtype="<i8").tobytes()
            )
        self._index.seek(0)
        self._index.write(HEADER.pack(MAGIC, 1, CODES[name], self.sequences, self.sequences + 1))


def _segments(packed: dict[str, Any], shard: Path) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (tokens, flags) of the segments of a packed sequence that hold text."""
    ends = np.cumsum(packed["doc_lens"], dtype=np.int64)
    if not len(ends) or ends[-1] != len(packed["tokens"]):
        raise DataPrepError(f"{shard}: a sequence's segments do not add up to its tokens")
    for end, length, flags in zip(
        ends.tolist(), packed["doc_lens"].tolist(), packed["doc_flags"].tolist(), strict=True
    ):
        if not flags & PADDING:
            yield packed["tokens"][end - length : end], flags


def _file(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)  # not with_suffix: a domain's name may hold a dot
