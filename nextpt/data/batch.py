"""Micro-batches of fixed shape, collated from stored sequences. B sequences, T inputs each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_prep.format import PADDING
from data_prep.mds import StoredSequence
from nextpt.base.errors import DataError

IGNORE_INDEX = -100  # torch's default for targets that are not predicted


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    A segment is a document, or a piece of one, that attention does not leave. Positions start at 0
    in every segment.

    Attributes:
        tokens: int64 [B, T].
        targets: int64 [B, T], IGNORE_INDEX where nothing is predicted.
        position_ids: int64 [B, T].
        document_ids: int32 [B, T], number of the segment in its sequence; -1 in padding.
        token_weights: fp32 [B, T], 0 where ignored.
        target_bytes: int32 [B, T], UTF-8 bytes of each target, 0 where ignored.
        is_text: bool [B, T], the target counts as text: neither ignored nor a special token.
        domain_ids: int64 [B].
        sequence_numbers: int64 [B], position of each sequence in the order of the run; in
            validation its number in the split.
        cu_seqlens: int32 [B * segments + 1], starts of the segments in the flattened inputs
            (padding is one), filled up with B * T. `segments` is a constant of the run
            (`segments_per_sequence`), so the size is too; no segment is longer than T.
    """

    tokens: Tensor
    targets: Tensor
    position_ids: Tensor
    document_ids: Tensor
    token_weights: Tensor
    target_bytes: Tensor
    is_text: Tensor
    domain_ids: Tensor
    sequence_numbers: Tensor
    cu_seqlens: Tensor

    def to(self, device: torch.device) -> Batch:
        """Copy to `device`; copies from pinned memory do not block."""
        return Batch(
            **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        )

    def pin_memory(self) -> Batch:
        """Copy to page-locked memory."""
        return Batch(**{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})


def padding_sequence(length: int, domain: int) -> StoredSequence:
    """A sequence of `length` = T + 1 tokens that are all padding."""
    return StoredSequence(
        np.zeros(length, np.uint16), np.array([length]), np.array([PADDING]), domain
    )


def segments_per_sequence(length: int, context: int, most: int | None = None) -> int:
    """Segments per sequence that cu_seqlens has room for.

    Args:
        length: Inputs of a sequence, T.
        context: Shortest context of the run; each cut at a multiple of it adds a segment.
        most: Largest number of segments in any sequence of the dataset. If it is unknown T / 2 + 2:
            a segment that predicts anything has two tokens, and only the ends of a sequence may
            hold shorter ones.
    """
    cuts = (length - 1) // context
    return min((most or length // 2 + 2) + cuts, length)


def collate(
    sequences: Sequence[StoredSequence],
    size: int,
    token_bytes: npt.NDArray[np.int32],
    domain_weights: npt.NDArray[np.float32],
    *,
    numbers: Sequence[int],
    segments: int,
    context: int,
) -> list[Batch]:
    """Collate sequences into batches.

    A target counts when it belongs to the same segment as its input; the first token of a segment
    is never predicted. All batches are built together, because numpy calls cost as much for a few
    tokens as for a thousand.

    Args:
        sequences: A multiple of `size`.
        size: Sequences per batch.
        token_bytes: UTF-8 bytes of each token, int32 [V].
        domain_weights: Loss weight of each domain's tokens, fp32 [domains].
        numbers: `Batch.sequence_numbers` of the sequences.
        segments: `segments_per_sequence`.
        context: No input attends further back than the last multiple of it in its sequence. Where
            that cuts a segment a new one begins; the target across the cut is still predicted.

    Returns:
        The batches, in order.

    Raises:
        DataError: A sequence contradicts itself or the tokenizer.
    """
    count, length = len(sequences), len(sequences[0].tokens) - 1
    assert count % size == 0, (count, size)
    inputs, targets = _inputs_and_targets(sequences, length)
    target_bytes = _bytes_of(targets, inputs, token_bytes)
    is_text = target_bytes > 0
    domains = np.array([sequence.domain for sequence in sequences], dtype=np.int64)
    weights = np.empty((count, length), np.float32)
    weights[:] = domain_weights[domains, None]
    for i, sequence in enumerate(sequences):
        if sequence.target_bytes is not None:
            target_bytes[i] = sequence.target_bytes[1:]
        if sequence.token_weights is not None:
            weights[i] *= sequence.token_weights[1:]

    stored = _Segments.of(sequences, length)
    ignored: list[Any] = [stored.last_inputs, *stored.padding_inputs()]
    for positions in ignored:
        targets.reshape(-1)[positions] = IGNORE_INDEX
        for values in (weights, target_bytes, is_text):
            values.reshape(-1)[positions] = 0
    attended = stored if context >= length else stored.cut(context)
    parts: dict[str, npt.NDArray[Any]] = {
        "tokens": inputs,
        "targets": targets,
        "position_ids": attended.positions(),
        "document_ids": attended.ids(),
        "token_weights": weights,
        "target_bytes": target_bytes,
        "is_text": is_text,
        "domain_ids": domains,
        "sequence_numbers": np.array(numbers, dtype=np.int64),
    }
    batches = []
    for number, cu_seqlens in enumerate(attended.cu_seqlens(size, segments)):
        rows = slice(number * size, (number + 1) * size)
        tensors = {name: torch.from_numpy(part[rows]) for name, part in parts.items()}
        batches.append(Batch(**tensors | {"cu_seqlens": torch.from_numpy(cu_seqlens)}))
    return batches


def _inputs_and_targets(
    sequences: Sequence[StoredSequence], length: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Tokens without the last, and without the first: int64 [sequences, length] each."""
    inputs, targets = (np.empty((len(sequences), length), np.int64) for _ in range(2))
    for i, sequence in enumerate(sequences):
        targets[i] = sequence.tokens[1:]
    inputs[:, 0] = [sequence.tokens[0] for sequence in sequences]
    inputs[:, 1:] = targets[:, :-1]
    return inputs, targets


def _bytes_of(
    targets: npt.NDArray[np.int64],
    inputs: npt.NDArray[np.int64],
    token_bytes: npt.NDArray[np.int32],
) -> npt.NDArray[np.int32]:
    """UTF-8 bytes of the targets. Raises DataError for a token outside the vocabulary."""
    try:
        target_bytes = token_bytes.take(targets)
        token_bytes.take(inputs[:, 0])  # all other inputs are targets too
        return target_bytes
    except IndexError as error:
        raise DataError(
            f"a sequence has a token outside the vocabulary of {len(token_bytes)}: {error};"
            " prepare the data again"
        ) from None


@lru_cache(maxsize=2)
def _arange(size: int) -> npt.NDArray[np.int64]:
    """0..size-1, cached: to build it takes as long as to use it."""
    return np.arange(size)


class _Segments:
    """Segments of the inputs of consecutive sequences.

    Args:
        count: Sequences.
        length: Inputs of each.
        starts: First input of each segment in the flattened inputs, int64.
        padding: Whether each segment is padding, bool.
        last_inputs: Inputs whose successor belongs to another segment, so that they predict
            nothing, int64.
    """

    def __init__(
        self,
        count: int,
        length: int,
        starts: npt.NDArray[np.int64],
        padding: npt.NDArray[np.bool_],
        last_inputs: npt.NDArray[np.int64],
    ) -> None:
        self.count = count
        self.length = length
        self.starts = starts
        self.padding = padding
        self.last_inputs = last_inputs
        self.lengths = np.diff(starts, append=count * length)

    @classmethod
    def of(cls, sequences: Sequence[StoredSequence], length: int) -> _Segments:
        """Segments as stored. Raises DataError when they do not add up."""
        counts = np.array([len(sequence.doc_lens) for sequence in sequences])
        lengths = np.concatenate([sequence.doc_lens for sequence in sequences]).astype(np.int64)
        flags = np.concatenate([sequence.doc_flags for sequence in sequences])
        lasts = np.cumsum(counts) - 1
        sums = np.add.reduceat(lengths, lasts - counts + 1)
        if len(flags) != len(lengths) or (sums != length + 1).any() or lengths.min() < 1:
            raise DataError(
                f"the segments of a sequence do not add up to its {length + 1} tokens; prepare the"
                " data again"
            )
        lengths[lasts] -= 1  # the last token of a sequence is a target only
        starts = np.cumsum(lengths) - lengths
        later = np.ones(len(lengths), bool)
        later[lasts - counts + 1] = False  # all but the first of each sequence
        occupied = lengths > 0
        padding = (flags[occupied] & PADDING) > 0
        return cls(len(sequences), length, starts[occupied], padding, starts[later] - 1)

    def padding_inputs(self) -> list[slice]:
        """Inputs of each padding segment."""
        starts = self.starts[self.padding].tolist()
        lengths = self.lengths[self.padding].tolist()
        return [slice(s, s + n) for s, n in zip(starts, lengths, strict=True)]

    def cut(self, context: int) -> _Segments:
        """The segments with a new one at every multiple of `context` in a sequence."""
        sequence_starts = np.arange(0, self.count * self.length, self.length)
        multiples = (sequence_starts[:, None] + np.arange(0, self.length, context)).reshape(-1)
        starts = np.union1d(self.starts, multiples)
        padding = self.padding[np.searchsorted(self.starts, starts, side="right") - 1]
        return _Segments(self.count, self.length, starts, padding, self.last_inputs)

    def positions(self) -> npt.NDArray[np.int64]:
        """Positions within the segments, int64 [count, length]."""
        positions = np.repeat(-self.starts, self.lengths)
        positions += _arange(self.count * self.length)
        return positions.reshape(self.count, self.length)

    def ids(self) -> npt.NDArray[np.int32]:
        """Numbers of the segments within their sequences, -1 in padding: int32 [count, length]."""
        sequence = self.starts // self.length
        firsts = np.searchsorted(self.starts, np.arange(self.count) * self.length)
        numbers = np.arange(len(self.starts)) - firsts[sequence]
        ids = np.where(self.padding, -1, numbers).astype(np.int32)
        return np.repeat(ids, self.lengths).reshape(self.count, self.length)

    def cu_seqlens(self, size: int, per_sequence: int) -> npt.NDArray[np.int32]:
        """Cumulative lengths of each batch.

        Args:
            size: Sequences per batch.
            per_sequence: Segments per sequence that there is room for.

        Returns:
            int32 [count / size, size * per_sequence + 1]: starts in the batch, then its inputs.

        Raises:
            DataError: A batch has more segments.
        """
        batches, total = self.count // size, size * self.length
        batch, start = self.starts // total, self.starts % total
        firsts = np.searchsorted(batch, np.arange(batches))
        slot = np.arange(len(batch)) - firsts[batch]
        if slot.max() >= size * per_sequence:
            raise DataError(
                f"{size} sequences have {slot.max() + 1} segments, more than the {per_sequence}"
                " per sequence of dataset.json; prepare the data again"
            )
        cu_seqlens = np.full((batches, size * per_sequence + 1), total, np.int32)
        cu_seqlens[batch, slot] = start
        return cu_seqlens
