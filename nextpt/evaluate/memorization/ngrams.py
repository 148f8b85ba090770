"""N-grams of text as 64-bit hashes, so that those of a corpus can be looked up in a table.

Two kinds: 13 words (GPT-3, arXiv 2005.14165 appendix C) and 50 characters (GPT-4, arXiv 2303.08774
appendix C), both of lower-cased text; words are runs of letters and digits, characters are those of
the words, without what is between. A hash of an n-gram is a polynomial in its units modulo 2^64,
each unit mixed first; two of 10^9 n-grams agree by chance with one of 10^6 with a probability of
10^9 * 10^6 / 2^64 = 5e-5.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import xxhash

WORDS, CHARACTERS = 13, 50
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that powers never vanish; 2^64 / golden ratio
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Units:
    """A text in the two forms that are compared.

    Attributes:
        words: Hash of each word, uint64 [words].
        characters: Each character, mixed, uint64 [characters].
    """

    words: np.ndarray
    characters: np.ndarray


def units(text: str) -> Units:
    """Take a text apart into words and characters."""
    matches = _WORD.findall(text.lower())
    words = np.fromiter(
        (xxhash.xxh64_intdigest(w.encode("utf-8", "surrogatepass")) for w in matches),
        np.uint64,
        len(matches),
    )
    return Units(
        words,
        _mix(
            np.frombuffer("".join(matches).encode("utf-32-le", "surrogatepass"), np.uint32).astype(
                np.uint64
            )
        ),
    )


def ngram_hashes(values: np.ndarray, length: int) -> np.ndarray:
    """Hash every n-gram of `length` units, uint64 [len(values) - length + 1].

    The result is empty where there are fewer units.
    """
    count = len(values) - length + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    # h of a + b units is h(a) + BASE^a * h(b, a units on): the binary digits of `length` need few
    # passes over the text.
    hashed: np.ndarray = np.zeros(count, np.uint64)
    covered = 0
    doubling, size = values, 1
    while covered < length:
        if length & size:
            hashed = hashed + _power(covered) * doubling[covered : covered + count]
            covered += size
        if covered < length:
            doubling = doubling[: len(doubling) - size] + _power(size) * doubling[size:]
            size *= 2
    return hashed


def _power(exponent: int) -> np.uint64:
    return np.uint64(pow(int(_BASE), exponent, 2**64))


def _mix(values: np.ndarray) -> np.ndarray:
    """Mix by the finaliser of splitmix64 (Steele et al. 2014).

    Characters are small numbers and would cancel in a polynomial.
    """
    x = values * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
