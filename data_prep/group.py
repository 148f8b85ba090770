"""Packing of one group of documents into sequences, written as MDS shards.

The shards of a group move to WORK/dataset/SPLIT/DOMAIN/gNNNNN by the rename of a whole folder;
WORK/packed/NNNNN.json, written after that, holds their counts and says that the group is done.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from data_prep.duplicates import Duplicates
from data_prep.encode import Advance, tokens_path
from data_prep.format import (
    ENDS_MID_DOCUMENT,
    PADDING,
    SPLITS,
    STARTS_MID_DOCUMENT,
    columns,
    token_dtype,
)
from data_prep.layout import Group, dropped
from data_prep.mds import encode_vector
from data_prep.pack import Pieces, pack, shuffled
from data_prep.plan import Plan
from data_prep.report import length_histogram
from data_prep.streaming_compat import import_streaming
from data_prep.tokenizer import Tokenizer
from data_prep.tokens import DOCUMENT, TokensFile
from nextpt.base.errors import DataPrepError
from nextpt.base.files import atomic_write

SHARD_BYTES = 2**26  # MDS's own default: large enough to stream, small enough to hash at once


def group_name(index: int) -> str:
    """Name of the folder of a group's shards."""
    return f"g{index:05d}"


def packed_path(work: Path, group: int) -> Path:
    """Counts of a group's shards, a file that exists when the group is done."""
    return work / "packed" / f"{group:05d}.json"


def read_packed(work: Path, group: int) -> dict[str, Any]:
    """Read the counts of a group: "seconds", and split -> counts as `_Sequences.write` returns."""
    packed: dict[str, Any] = json.loads(packed_path(work, group).read_text(encoding="utf-8"))
    if "heldout" in packed:  # written before format version 3
        packed["validation"] = packed.pop("heldout")
        for split in SPLITS:
            packed[split]["sequences"] = packed[split].pop("rows")
    return packed


@dataclass(frozen=True)
class Documents:
    """Documents of one split.

    Attributes:
        stream: [start] + tokens + [end] of all documents, one after another.
        sizes: uint32, bytes of each position of the stream; None with byte_counts "table".
        offsets: int64 [documents + 1] into the stream.
        bytes: UTF-8 bytes of all texts.
    """

    stream: np.ndarray
    sizes: np.ndarray | None
    offsets: np.ndarray
    bytes: int

    @property
    def lengths(self) -> np.ndarray:
        """int64 [documents]: tokens of each document, start and end included."""
        return np.diff(self.offsets)


def pack_group(
    plan: Plan,
    group: Group,
    domain: int,
    tokenizer: Tokenizer,
    duplicates: Duplicates,
    advance: Advance = lambda n: None,
) -> None:
    """Pack a group and write its shards.

    Args:
        plan: The plan.
        group: The group.
        domain: Number of its domain in the dataset.
        tokenizer: The tokenizer of the preparation.
        duplicates: Results of the duplicates stage.
        advance: Called with the number of tokens written.
    """
    work = plan.spec.work
    name = group_name(group.index)
    staging = work / "packed" / f".{name}-{socket.gethostname()}-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    counts: dict[str, Any] = {}
    started = time.process_time()
    try:
        for number, split in enumerate(SPLITS):
            documents = gather(plan, group, duplicates, tokenizer, split=split)
            sequences = _Sequences(plan, tokenizer, documents, domain)
            counts[split] = sequences.write(staging / split, 2 * group.index + number)
            advance(int(documents.offsets[-1]))
        for split in SPLITS:
            target = work / "dataset" / split / group.domain / name
            # If it exists, another worker has written the same bytes
            if counts[split]["sequences"] and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                os.rename(staging / split, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    with atomic_write(packed_path(work, group.index)) as file:
        json.dump(counts | {"seconds": time.process_time() - started}, file)


def gather(
    plan: Plan, group: Group, duplicates: Duplicates, tokenizer: Tokenizer, *, split: str
) -> Documents:
    """Read the documents of a group that belong to one split, without dropped ones."""
    tokens, sizes, lengths, total = [], [], [], 0
    for unit in range(group.start[0], min(group.stop[0] + 1, len(plan.units))):
        file = TokensFile(tokens_path(plan.spec.work, unit))
        if group.domain not in file.footer["domains"]:
            continue
        first = group.start[1] if unit == group.start[0] else 0
        last = group.stop[1] if unit == group.stop[0] else len(file.documents)
        chosen = _chosen(file.documents, file.footer["domains"].index(group.domain), split)
        chosen[:first] = chosen[last:] = False
        chosen[dropped(plan, duplicates, unit)] = False
        counts = file.documents["tokens"].astype(np.int64)
        tokens.append(_select(file.tokens, counts, chosen))
        if tokenizer.byte_counts == "column":
            sizes.append(_select(file.sizes, counts + 1, chosen))
        lengths.append(counts[chosen])
        total += int(file.documents["bytes"][chosen].sum(dtype=np.int64))
    counts = np.concatenate([np.zeros(0, np.int64), *lengths])
    offsets = np.concatenate(([0], np.cumsum(counts + 2)))
    stream = _spread(tokens, lengths, offsets, token_dtype(tokenizer.vocab_size))
    stream[offsets[:-1]], stream[offsets[1:] - 1] = tokenizer.start_id, tokenizer.end_id
    placed = None
    if tokenizer.byte_counts == "column":
        # The end token has a size too
        placed = _spread(sizes, [counts + 1 for counts in lengths], offsets, np.uint32)
        placed[offsets[:-1]] = 0
    return Documents(stream, placed, offsets, total)


def _spread(
    parts: list[np.ndarray], counts: list[np.ndarray], offsets: np.ndarray, dtype: npt.DTypeLike
) -> np.ndarray:
    """Copy values of documents to their positions in the stream, from each document's second on.

    One copy per document and no other: a mask over all positions takes longer for all but the
    shortest documents.

    Args:
        parts: Values of the documents, one array per unit.
        counts: Number of values of each document, one array per unit.
        offsets: int64 [documents + 1], where each document begins in the stream.
        dtype: Type of the result.

    Returns:
        The stream; positions of start and end tokens are not set.
    """
    spread = np.empty(offsets[-1], dtype=dtype)
    positions = iter((offsets[:-1] + 1).tolist())
    for values, lengths in zip(parts, counts, strict=True):
        first = 0
        for count, position in zip(lengths.tolist(), positions, strict=False):
            spread[position : position + count] = values[first : first + count]
            first += count
    return spread


def _chosen(documents: np.ndarray, domain: int, split: str) -> np.ndarray:
    assert documents.dtype == DOCUMENT
    in_split = documents["validation"] == (split == "validation")
    return np.asarray((documents["domain"] == domain) & in_split)


def _select(values: np.ndarray, counts: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Select the values of the chosen documents; documents have `counts` values each."""
    if chosen.all():
        return values
    ends = np.cumsum(counts)
    indices = np.flatnonzero(chosen)
    if not len(indices):
        return values[:0]
    # Adjacent documents are copied as one stretch; with one domain per unit that is nearly all.
    breaks = np.flatnonzero(np.diff(indices) > 1)
    firsts = indices[np.concatenate(([0], breaks + 1))]
    lasts = indices[np.concatenate((breaks, [len(indices) - 1]))]
    return np.concatenate(
        [values[ends[a] - counts[a] : ends[b]] for a, b in zip(firsts, lasts, strict=True)]
    )


class _Sequences:
    """The sequences of one group and split."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer, documents: Documents, domain: int) -> None:
        self.spec = plan.spec
        self.documents = documents
        self.domain = np.uint16(domain).tobytes()
        self.tokenizer = tokenizer
        self.capacity = plan.spec.sequence_length + 1
        self.table = tokenizer.token_bytes()
        self.pieces, self.sequences = pack(documents.lengths, self.capacity, plan.spec.packing)
        self.begins = documents.offsets[self.pieces.document] + self.pieces.start
        self.ends = documents.offsets[self.pieces.document] + self.pieces.stop
        self.flags = _flags(self.pieces, documents.lengths)
        self.text_tokens = self.max_segments = 0

    def write(self, folder: Path, stream: int) -> dict[str, Any]:
        """Write the shards in shuffled order and return their counts.

        Best-fit packing makes the sequences of long documents first, hence the shuffle.
        """
        if self.sequences:
            layout = columns(
                self.spec.sequence_length, self.tokenizer.vocab_size, self.tokenizer.byte_counts
            )
            # Not used as a context manager: after a failure its __exit__ would write an index of
            # half the sequences.
            writer = import_streaming().MDSWriter(
                columns=layout,
                out=str(folder),
                compression=self.spec.compression,
                hashes=["xxh64"],
                size_limit=SHARD_BYTES,
            )
            for number in shuffled(len(self.sequences), self.spec.seed, stream).tolist():
                writer.write(self._sample(self.sequences[number]))
            writer.finish()
        return self._summary(_check_shards(folder) if self.sequences else [])

    def _sample(self, pieces: list[int]) -> dict[str, bytes]:
        """Encode one MDS sample (columns of data_prep.format) of some pieces.

        The writer takes bytes as they are; its own encoding costs twice as much as all the rest of
        writing.
        """
        begins, ends = self.begins[pieces].tolist(), self.ends[pieces].tolist()
        flags = self.flags[pieces].tolist()
        lengths = [end - begin for begin, end in zip(begins, ends, strict=True)]
        tokens = self._joined(self.documents.stream, begins, ends, self.tokenizer.end_id)
        filled = sum(lengths)
        own = self.table[tokens]
        firsts = [0, *accumulate(lengths[:-1])]  # first tokens of segments are no targets
        own[firsts] = own[filled:] = 0
        self.text_tokens += int(np.count_nonzero(own))
        if self.documents.sizes is None:
            target_bytes = own
        else:
            target_bytes = self._joined(self.documents.sizes, begins, ends, 0)
            target_bytes[firsts] = 0
        if filled < self.capacity:
            lengths.append(self.capacity - filled)
            flags.append(PADDING)
        self.max_segments = max(self.max_segments, len(lengths))
        sample = {
            "tokens": tokens.tobytes(),
            "doc_lens": encode_vector(np.array(lengths, dtype=np.uint32)),
            "doc_flags": encode_vector(np.array(flags, dtype=np.uint8)),
            "domain": self.domain,
            "text_bytes": target_bytes.sum(dtype=np.uint32).tobytes(),
        }
        if self.documents.sizes is not None:
            sample["target_bytes"] = target_bytes.tobytes()
        return sample

    def _joined(
        self, values: np.ndarray, begins: list[int], ends: list[int], padding: int
    ) -> np.ndarray:
        """Concatenate the stretches of `values` that make a sequence, and pad to its length."""
        parts = [values[begin:end] for begin, end in zip(begins, ends, strict=True)]
        missing = self.capacity - sum(map(len, parts))
        if missing:
            parts.append(np.full(missing, padding, dtype=values.dtype))
        return np.concatenate(parts)

    def _summary(self, shards: list[dict[str, Any]]) -> dict[str, Any]:
        lengths, pieces = self.documents.lengths, self.pieces
        per_document = np.bincount(pieces.document, minlength=len(lengths))
        assert len(self.sequences) == sum(shard["samples"] for shard in shards)
        return {
            "documents": len(lengths),
            "bytes": self.documents.bytes,
            "tokens": int((pieces.lengths - 1).sum()),
            "text_tokens": int(self.text_tokens),
            "sequences": len(self.sequences),
            "padding_tokens": len(self.sequences) * self.capacity - int(pieces.lengths.sum()),
            "max_segments": self.max_segments,
            "pieces": len(pieces.start),
            "cut_documents": int((per_document > 1).sum()),
            "histogram": length_histogram(lengths).tolist(),
            "shards": shards,
        }


def _flags(pieces: Pieces, lengths: np.ndarray) -> np.ndarray:
    begins_inside = np.where(pieces.start > 0, STARTS_MID_DOCUMENT, 0)
    ends_inside = np.where(pieces.stop < lengths[pieces.document], ENDS_MID_DOCUMENT, 0)
    return np.asarray(begins_inside | ends_inside)


def _check_shards(folder: Path) -> list[dict[str, Any]]:
    """Verify what the writer wrote against its hashes, and sync it.

    Returns:
        The shards of its index.json, which is removed: the whole domain gets one.
    """
    index = folder / "index.json"
    shards: list[dict[str, Any]] = json.loads(index.read_text(encoding="utf-8"))["shards"]
    for shard in shards:
        stored = shard["zip_data"] or shard["raw_data"]
        path = folder / stored["basename"]
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            data = file.read()
        if (
            len(data) != stored["bytes"]
            or xxhash.xxh64_hexdigest(data) != stored["hashes"]["xxh64"]
        ):
            raise DataPrepError(f"{path} was not stored as it was written; is the disk failing?")
    index.unlink()
    return shards
