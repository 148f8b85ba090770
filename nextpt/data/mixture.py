"""How many samples each domain gives: exact integer counts per block.

Shares are rounded once to multiples of 1 / UNIT. Samples are cut into blocks of BLOCK, blocks into
periods of PERIOD blocks, PERIOD BLOCK = UNIT: in a period domain d gives exactly its weight w_d,
whole samples, whatever the period's number. A block holds floor(w_d / PERIOD) samples of domain d
and at most one more (per whole PERIOD of what floor leaves over): the places left over are dealt by
systematic sampling at offset o_j in block j of a period, o a permutation of 0..PERIOD-1 (the bits
of j reversed, van der Corput's sequence, so that any run of blocks is nearly even). Every offset
comes once, so every remainder is dealt exactly once. Counts of blocks never fall below 0, so what a
domain has given only grows.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

BLOCK = 4096
UNIT = 2**20
PERIOD = UNIT // BLOCK


def quantise_shares(shares: list[float]) -> tuple[int, ...]:
    """Integer weights that sum to UNIT, by largest remainder; a share above 0 weighs at least 1.

    In exact fractions, so that every machine rounds alike. shares: finite, >= 0, one above 0, at
    most UNIT of them.
    """
    total = sum(map(Fraction, shares))
    exact = [Fraction(share) * UNIT / total for share in shares]
    weights = [max(int(e), e > 0) for e in exact]
    by_remainder = sorted(range(len(shares)), key=lambda d: (weights[d] - exact[d], d))
    for d in by_remainder[: max(UNIT - sum(weights), 0)]:
        weights[d] += 1
    while sum(weights) > UNIT:  # minimal weights took more than rounding down had left
        weights[weights.index(max(weights))] -= 1
    return tuple(int(w) for w in weights)


class Mixture:
    """Counts of domains with given weights (of `quantise_shares`), from block 0 on."""

    def __init__(self, weights: tuple[int, ...]) -> None:
        self.weights = np.array(weights, dtype=np.int64)
        assert self.weights.sum() == UNIT and self.weights.min() >= 0
        offsets = np.array(
            [int(f"{j:0{PERIOD.bit_length() - 1}b}"[::-1], 2) for j in range(PERIOD)]
        )
        edges = np.concatenate(([0], np.cumsum(self.weights % PERIOD)))
        # Places k PERIOD + offset below each edge
        dealt = np.diff(-((offsets[:, None] - edges) // PERIOD), axis=1)
        self._amounts = self.weights // PERIOD + dealt
        self._before = np.concatenate(
            (np.zeros((1, len(weights)), np.int64), np.cumsum(self._amounts, axis=0))
        )

    def amounts(self, block: int) -> np.ndarray:
        """int64 [domains]: samples of each domain in a block; sums to BLOCK."""
        return self._amounts[block % PERIOD]

    def before(self, block: int) -> np.ndarray:
        """int64 [domains]: samples of each domain in all blocks before this one.

        Sums to block * BLOCK.
        """
        return block // PERIOD * self.weights + self._before[block % PERIOD]
