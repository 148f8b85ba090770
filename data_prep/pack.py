"""Packing: documents into rows of fixed length, boundaries kept, nothing thrown away."""

from __future__ import annotations

import numpy as np


def split_long(length: int, capacity: int) -> list[tuple[int, int]]:
    """Pieces [start, stop) of a document of `length` tokens, each at most `capacity`, overlapping by one token.

    Within a piece all tokens but the first are targets, so each token but the document's first is the target once.
    """
    pieces, start = [], 0
    while True:
        stop = min(start + capacity, length)
        pieces.append((start, stop))
        if stop == length:
            return pieces
        start = stop - 1


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Rows as lists of piece indices: longest pieces first, each into the fullest row that still has room.

    arXiv 2404.10830 (best-fit packing): nearly no padding and no needless cuts. Free space is looked up in an integer
    whose bit s is set while some row has s tokens free; deterministic. Raises ValueError for a piece above capacity.
    """
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"a piece of {lengths.max()} tokens is longer than a row of {capacity}")
    rows: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = with_space[space].pop()
            if not with_space[space]:
                spaces &= ~(1 << space)
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(piece)
        left = space - length
        if left > 1:  # one free token can hold no target
            with_space[left].append(row)
            spaces |= 1 << left
    return rows


def shuffled(count: int, seed: int, stream: int) -> np.ndarray:
    """Permutation of range(count): a function of (seed, stream) on every machine."""
    return np.random.Generator(np.random.Philox(key=[seed, stream])).permutation(count)
