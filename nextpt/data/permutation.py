"""Random permutations as a function of integers: equal on every machine and numpy version.

numpy guarantees the raw stream of a bit generator, but not what Generator.permutation draws from it
(NEP 19). So a permutation here is the stable sorting order of raw 64-bit words of Philox (Salmon et
al., SC 2011), which reaches any (key, counter) at once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def permutation(
    size: int, seed: int, stream: int, counter: tuple[int, int, int]
) -> npt.NDArray[np.int64]:
    """Draw a permutation of 0..size-1.

    Args:
        size: Number of elements.
        seed: First word of the Philox key.
        stream: Second word of the key.
        counter: Upper words of the Philox counter. Each (seed, stream, counter) has its own words.

    Returns:
        int64 [size].
    """
    words = np.random.Philox(key=[seed, stream], counter=[0, *counter]).random_raw(size)
    return np.argsort(words, kind="stable")
