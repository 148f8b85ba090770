"""Intervals of ratios of sums, by resampling documents (Efron's percentile bootstrap).

Tokens of one document depend on each other, documents hardly do: so whole documents are drawn, with
replacement, as many as there are. Of several domains each is resampled by itself, for its share in
the total was chosen and not drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95
WEIGHTS_AT_ONCE = 2**22  # int64 numbers, 32 MiB


def resampled_sums(sums: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """fp64 [resamples, k]: sums over documents drawn with replacement. sums [documents, k]: of each document."""
    count = len(sums)
    found, step = np.empty((resamples, sums.shape[1])), max(1, WEIGHTS_AT_ONCE // count)
    for first in range(0, resamples, step):
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=min(step, resamples - first))
        found[first : first + step] = drawn @ sums
    return found


def ratio_interval(numerators: np.ndarray, denominators: np.ndarray) -> list[float] | None:
    """[low, high] that holds the middle CONFIDENCE of the ratios.

    None without at least two different ones.

    Draws whose denominator is 0 say nothing of the ratio and are left out.
    """
    kept = denominators > 0
    ratios = numerators[kept] / denominators[kept]
    return middle(ratios) if len(ratios) and np.ptp(ratios) else None


def middle(values: np.ndarray) -> list[float]:
    """[low, high] that holds the middle CONFIDENCE of resampled values."""
    return np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]).tolist()


def stratified(strata: Sequence[np.ndarray], resamples: int, seed: int) -> list[np.ndarray]:
    """The resampled sums of each stratum, independent of each other.

    Their sum is that of the whole.
    """
    streams = np.random.default_rng(seed).spawn(len(strata))
    return [resampled_sums(sums, resamples, rng) for sums, rng in zip(strata, streams, strict=True)]
