"""Confidence intervals of ratios of sums: percentile bootstrap over documents (Efron).

Tokens of one document depend on each other, documents hardly do: so whole documents are drawn, with
replacement, as many as there are. Each of several domains is resampled by itself, because its share
in the total was chosen and not drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95
WEIGHTS_AT_ONCE = 2**22  # int64 numbers, 32 MiB


def resampled_sums(sums: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Sum over documents drawn with replacement.

    Args:
        sums: Sums of each document, [documents, k].
        resamples: Number of draws.
        rng: Source of the draws.

    Returns:
        fp64 [resamples, k].
    """
    count = len(sums)
    resampled, step = np.empty((resamples, sums.shape[1])), max(1, WEIGHTS_AT_ONCE // count)
    for first in range(0, resamples, step):
        size = min(step, resamples - first)
        weights = rng.multinomial(count, np.full(count, 1 / count), size=size)
        resampled[first : first + step] = weights @ sums
    return resampled


def ratio_interval(numerators: np.ndarray, denominators: np.ndarray) -> list[float] | None:
    """Interval [low, high] of the middle CONFIDENCE of resampled ratios.

    Resamples whose denominator is 0 say nothing of the ratio and are left out. Returns None without
    two different ratios.
    """
    kept = denominators > 0
    ratios = numerators[kept] / denominators[kept]
    return middle(ratios) if len(ratios) and np.ptp(ratios) else None


def middle(values: np.ndarray) -> list[float]:
    """Interval [low, high] of the middle CONFIDENCE of resampled values."""
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return [float(low), float(high)]


def stratified(strata: Sequence[np.ndarray], resamples: int, seed: int) -> list[np.ndarray]:
    """Resample the sums of each stratum, independently of the others.

    The sum of the results is a resample of the whole.
    """
    streams = np.random.default_rng(seed).spawn(len(strata))
    return [resampled_sums(sums, resamples, rng) for sums, rng in zip(strata, streams, strict=True)]
