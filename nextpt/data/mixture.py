"""Mixture of domains: exact integer counts of sequences per domain in every block.

Shares are rounded once, to multiples of 1 / UNIT. Sequences are grouped into blocks of BLOCK, and
blocks into periods of PERIOD blocks, with PERIOD * BLOCK = UNIT: a period has exactly w_d sequences
of domain d, where w_d is its weight, whatever the period's number. A block has floor(w_d / PERIOD)
sequences of domain d and at most one more per whole PERIOD of the remainders: these are dealt by
systematic sampling at offset o_j in block j of a period, where o is a permutation of 0..PERIOD-1
(bit reversal, van der Corput's sequence, so that any run of blocks is nearly even). Every offset
occurs once, so every remainder is dealt exactly once. Counts of blocks are never negative, so the
cumulative counts of a domain only grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

BLOCK = 4096
UNIT = 2**20
PERIOD = UNIT // BLOCK


def quantise_shares(shares: Sequence[float], unit: int = UNIT) -> tuple[int, ...]:
    """Round shares to integer weights that sum to `unit`, by largest remainder.

    Computed in exact fractions, so that every machine rounds alike.

    Args:
        shares: Finite, >= 0, at least one above 0. Any sum.
        unit: Sum of the weights.

    Returns:
        One weight per share; at least 1 where the share is above 0, if `unit` has enough.
    """
    total = sum(map(Fraction, shares))
    exact = [Fraction(share) * unit / total for share in shares]
    weights = [max(int(e), e > 0) for e in exact]
    by_remainder = sorted(range(len(shares)), key=lambda d: (weights[d] - exact[d], d))
    for d in by_remainder[: max(unit - sum(weights), 0)]:
        weights[d] += 1
    while sum(weights) > unit:  # minimal weights took more than rounding down had left
        weights[weights.index(max(weights))] -= 1
    return tuple(int(w) for w in weights)


class Mixture:
    """Counts of sequences per domain and block, for weights of `quantise_shares`."""

    def __init__(self, weights: tuple[int, ...]) -> None:
        self.weights = np.array(weights, dtype=np.int64)
        assert self.weights.sum() == UNIT and self.weights.min() >= 0
        offsets = np.array(
            [int(f"{j:0{PERIOD.bit_length() - 1}b}"[::-1], 2) for j in range(PERIOD)]
        )
        edges = np.concatenate(([0], np.cumsum(self.weights % PERIOD)))
        # Points k * PERIOD + offset below each edge
        dealt = np.diff(-((offsets[:, None] - edges) // PERIOD), axis=1)
        self._counts: npt.NDArray[np.int64] = self.weights // PERIOD + dealt
        self._cumulative: npt.NDArray[np.int64] = np.concatenate(
            (np.zeros((1, len(weights)), np.int64), np.cumsum(self._counts, axis=0))
        )

    def counts(self, block: int) -> npt.NDArray[np.int64]:
        """Sequences of each domain in a block: int64 [domains], sums to BLOCK."""
        counts: npt.NDArray[np.int64] = self._counts[block % PERIOD]
        return counts

    def counts_before(self, block: int) -> npt.NDArray[np.int64]:
        """Sequences of each domain in all earlier blocks, int64 [domains]; sum block * BLOCK."""
        counts: npt.NDArray[np.int64] = (
            block // PERIOD * self.weights + self._cumulative[block % PERIOD]
        )
        return counts
