"""Random permutations that are a function of integers alone, on every machine and with every version of numpy.

numpy promises the raw stream of a bit generator for ever, but not what Generator.permutation makes
of it (NEP 19). So a permutation here is the stable sorting order of raw 64-bit words of Philox
(Salmon et al., SC 2011), which reaches any (key, counter) at once.
"""

from __future__ import annotations

import numpy as np


def permutation(size: int, seed: int, stream: int, place: tuple[int, int, int]) -> np.ndarray:
    """int64 [size], a permutation. Each (seed, stream, place) has words of its own."""
    words = np.random.Philox(key=[seed, stream], counter=[0, *place]).random_raw(size)
    return np.argsort(words, kind="stable")
