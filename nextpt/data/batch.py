"""A micro-batch: fixed shapes, everything the model and the objective need. B rows, T inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from data_prep.format import PADDING
from data_prep.mds import StoredSequence
from nextpt.base.errors import DataError

IGNORE_INDEX = -100  # torch's own default for targets that are not predicted


@dataclass(frozen=True)
class Batch:
    """tokens, targets (IGNORE_INDEX: none), position_ids: int64 [B, T].

    document_ids: int32 [B, T], padding -1.

    cu_seqlens: int32 [B * segments + 1], starts of the segments in the flattened inputs (padding is
    one), then B * T over and over; `segments` is a constant of the run (segments_per_sequence), so the
    size is too, and the longest is at most T.
    token_weights: fp32 [B, T], 0 where ignored. target_bytes: int32 [B, T], UTF-8 bytes of each
    target, 0 where ignored.
    is_text: bool [B, T], the target is counted as text: not ignored and not a special token.
    domain_ids: int64 [B]. Positions start at 0 in every segment of a row.
    """

    tokens: Tensor
    targets: Tensor
    position_ids: Tensor
    document_ids: Tensor
    token_weights: Tensor
    target_bytes: Tensor
    is_text: Tensor
    domain_ids: Tensor
    cu_seqlens: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; from pinned memory the copies do not block."""
        return Batch(
            **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        )

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory."""
        return Batch(**{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})


def padding_sequence(length: int, domain: int) -> StoredSequence:
    """A row of nothing but padding. length: T + 1."""
    return StoredSequence(
        np.zeros(length, np.uint16), np.array([length]), np.array([PADDING]), domain
    )


def segments_per_sequence(length: int, context: int, most: int | None = None) -> int:
    """Segments of the T = length inputs of a row that cu_seqlens has room for.

    most: the largest number in any row of the dataset, where it is known; else T / 2 + 2, because a
    segment that predicts anything has two tokens and only the ends of a row may hold shorter ones.
    Cutting at `context` adds one per cut.
    """
    cuts = (length - 1) // context
    return min((most or length // 2 + 2) + cuts, length)


def collate(
    rows: Sequence[StoredSequence],
    size: int,
    token_bytes: np.ndarray,
    domain_weights: np.ndarray,
    *,
    segments: int,
    context: int,
) -> list[Batch]:
    """SequenceSource as batches of `size`. token_bytes: int32 [V]. domain_weights: fp32 [domains], the loss weight of each domain's tokens.

    segments: segments_per_sequence. context: no input sees further back than the last multiple of it in
    its row; where it cuts a segment a new one begins, and the target across the cut is predicted
    all the same. A target counts when it belongs to the document piece of its input; the first
    token of a piece is never predicted. All rows are made together, because a few tokens cost numpy
    as much as a thousand. Raises DataError when a row contradicts itself or the tokenizer.
    """
    count, length = len(rows), len(rows[0].tokens) - 1
    assert count % size == 0, (count, size)
    inputs, targets = np.empty((count, length), np.int64), np.empty((count, length), np.int64)
    for i, row in enumerate(rows):
        targets[i] = row.tokens[1:]
    inputs[:, 0] = [row.tokens[0] for row in rows]
    inputs[:, 1:] = targets[:, :-1]
    try:
        bytes_of_targets = token_bytes.take(targets)
        token_bytes.take(inputs[:, 0])
    except IndexError as error:
        raise DataError(
            f"a row holds a token outside the vocabulary of {len(token_bytes)}: {error}; prepare"
            " the data again"
        ) from None
    is_text = bytes_of_targets > 0
    domains = np.array([row.domain for row in rows], dtype=np.int64)
    weights = np.empty((count, length), np.float32)
    weights[:] = domain_weights[domains, None]
    for i, row in enumerate(rows):
        if row.target_bytes is not None:
            bytes_of_targets[i] = row.target_bytes[1:]
        if row.token_weights is not None:
            weights[i] *= row.token_weights[1:]

    pieces = _Segments.of(rows, length)
    for none in (pieces.last_inputs, *pieces.padding_inputs()):
        targets.reshape(-1)[none] = IGNORE_INDEX
        for values in (weights, bytes_of_targets, is_text):
            values.reshape(-1)[none] = 0
    seen = pieces if context >= length else pieces.cut(context)
    whole = (
        inputs,
        targets,
        seen.positions(),
        seen.ids(),
        weights,
        bytes_of_targets,
        is_text,
        domains,
    )
    return [
        Batch(
            *(torch.from_numpy(part[first : first + size]) for part in whole),
            cu_seqlens=torch.from_numpy(cu),
        )
        for first, cu in zip(range(0, count, size), seen.cu_seqlens(size, segments), strict=True)
    ]


@lru_cache(maxsize=2)
def _ramp(size: int) -> np.ndarray:
    """0..size-1, kept: making it again takes as long as using it."""
    return np.arange(size)


class _Segments:
    """Segments of the inputs of `count` rows of `length`, one row after another. starts, lengths: int64; padding: bool.

    last_inputs: places of inputs whose successor is of another segment, so not theirs to predict.
    """

    def __init__(
        self,
        count: int,
        length: int,
        starts: np.ndarray,
        padding: np.ndarray,
        last_inputs: np.ndarray,
    ) -> None:
        self.count = count
        self.length = length
        self.starts = starts
        self.padding = padding
        self.last_inputs = last_inputs
        self.lengths = np.diff(starts, append=count * length)

    @classmethod
    def of(cls, rows: Sequence[StoredSequence], length: int) -> _Segments:
        counts = np.array([len(row.doc_lens) for row in rows])
        lengths = np.concatenate([row.doc_lens for row in rows]).astype(np.int64)
        flags = np.concatenate([row.doc_flags for row in rows])
        lasts = np.cumsum(counts) - 1
        sums = np.add.reduceat(lengths, lasts - counts + 1)
        if len(flags) != len(lengths) or (sums != length + 1).any() or lengths.min() < 1:
            raise DataError(
                f"the segments of a row do not add up to its {length + 1} tokens; prepare the data"
                " again"
            )
        lengths[lasts] -= 1  # the last token of a row is a target only
        starts = np.cumsum(lengths) - lengths
        later = np.ones(len(lengths), bool)
        later[lasts - counts + 1] = False  # all but the first of each row
        there = lengths > 0
        return cls(
            len(rows), length, starts[there], (flags[there] & PADDING) > 0, starts[later] - 1
        )

    def padding_inputs(self) -> list[slice]:
        return [
            slice(s, s + n)
            for s, n in zip(
                self.starts[self.padding].tolist(), self.lengths[self.padding].tolist(), strict=True
            )
        ]

    def cut(self, context: int) -> _Segments:
        """The segments with a new one at every multiple of `context` in a row."""
        row_starts = np.arange(0, self.count * self.length, self.length)
        multiples = (row_starts[:, None] + np.arange(0, self.length, context)).reshape(-1)
        starts = np.union1d(self.starts, multiples)
        padding = self.padding[np.searchsorted(self.starts, starts, side="right") - 1]
        return _Segments(self.count, self.length, starts, padding, self.last_inputs)

    def positions(self) -> np.ndarray:
        """int64 [rows, length]: places within segments."""
        places = np.repeat(-self.starts, self.lengths)
        places += _ramp(self.count * self.length)
        return places.reshape(self.count, self.length)

    def ids(self) -> np.ndarray:
        """int32 [rows, length]: numbers of segments within their rows; -1 in padding."""
        rows = self.starts // self.length
        firsts = np.searchsorted(self.starts, np.arange(self.count) * self.length)
        ids = np.where(self.padding, -1, np.arange(len(self.starts)) - firsts[rows]).astype(
            np.int32
        )
        return np.repeat(ids, self.lengths).reshape(self.count, self.length)

    def cu_seqlens(self, size: int, per_row: int) -> np.ndarray:
        """int32 [rows / size, size * per_row + 1]: for every `size` rows their starts, then their total."""
        batches, total = self.count // size, size * self.length
        batch, start = self.starts // total, self.starts % total
        firsts = np.searchsorted(batch, np.arange(batches))
        place = np.arange(len(batch)) - firsts[batch]
        if place.max() >= size * per_row:
            raise DataError(
                f"{size} rows hold {place.max() + 1} segments, more than the {per_row} per row that"
                " there is room for; prepare the data again"
            )
        found = np.full((batches, size * per_row + 1), total, np.int32)
        found[batch, place] = start
        return found
