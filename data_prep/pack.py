"""Packing of documents into sequences of fixed length: boundaries kept, no token dropped."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Pieces:
    """Stretches [start, stop) of documents, int64 [pieces] each.

    Pieces of the same document overlap by one token. Within a piece all tokens but the first are
    targets, so each token but a document's first is the target once.
    """

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """int64 [pieces]: tokens of each piece."""
        return np.asarray(self.stop - self.start)


def cut_long(lengths: np.ndarray, capacity: int) -> Pieces:
    """Cut documents into pieces of at most `capacity` tokens.

    lengths: int64 [documents], tokens of each, at least 2.
    """
    counts = np.maximum(-(-(lengths - 1) // (capacity - 1)), 1)
    document = np.repeat(np.arange(len(lengths)), counts)
    first = np.cumsum(counts) - counts
    start = (np.arange(len(document)) - first[document]) * (capacity - 1)
    return Pieces(document, start, np.minimum(start + capacity, lengths[document]))


def pack(lengths: np.ndarray, capacity: int, method: str) -> tuple[Pieces, list[list[int]]]:
    """Pack documents by one of the methods of the manifest.

    Args:
        lengths: int64 [documents], tokens of each document.
        capacity: Tokens of a sequence.
        method: "best_fit", "concat" or "single".

    Returns:
        The pieces, and each sequence as a list of pieces.
    """
    if method == "concat":
        return concatenate(lengths, capacity)
    pieces = cut_long(lengths, capacity)
    if method == "single":
        return pieces, [[i] for i in range(len(pieces.start))]
    return pieces, best_fit_decreasing(pieces.lengths, capacity)


def concatenate(lengths: np.ndarray, capacity: int) -> tuple[Pieces, list[list[int]]]:
    """Put documents one after another, cut wherever a sequence is full.

    The rest of a cut document begins the next sequence.
    """
    cut: list[tuple[int, int, int]] = []
    sequences: list[list[int]] = [[]]
    room = capacity
    for document, length in enumerate(lengths.tolist()):
        start = 0
        while True:
            if room < 2:  # one free token can hold no target
                sequences.append([])
                room = capacity
            stop = min(start + room, length)
            sequences[-1].append(len(cut))
            cut.append((document, start, stop))
            room -= stop - start
            if stop == length:
                break
            start = stop - 1
    columns = np.array(cut, dtype=np.int64).reshape(-1, 3).T
    return Pieces(*columns), [sequence for sequence in sequences if sequence]


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Pack the longest pieces first, each into the fullest sequence that still has room.

    arXiv 2404.10830 (best-fit packing): nearly no padding and no needless cuts. Free space is
    looked up in an integer whose bit s is set while some sequence has s tokens free; the result is
    deterministic.

    Returns:
        Rows as lists of piece indices.

    Raises:
        ValueError: For a piece above `capacity`.
    """
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(
            f"a piece of {lengths.max()} tokens is longer than a sequence of {capacity}"
        )
    sequences: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            sequence = with_space[space].pop()
            if not with_space[space]:
                spaces &= ~(1 << space)
        else:
            space, sequence = capacity, len(sequences)
            sequences.append([])
        sequences[sequence].append(piece)
        left = space - length
        if left > 1:  # one free token can hold no target
            with_space[left].append(sequence)
            spaces |= 1 << left
    return sequences


def shuffled(count: int, seed: int, stream: int) -> np.ndarray:
    """Permutation of range(count), a function of (seed, stream) on every machine."""
    generator = np.random.Generator(np.random.Philox(key=[seed, stream]))
    return np.asarray(generator.permutation(count))
