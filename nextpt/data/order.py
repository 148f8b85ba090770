"""The global order of rows: a pure function of (seed, mixing, rows per domain, position).

Positions 0, 1, 2, ... are the rows in the order in which training sees them, whatever the number of ranks, the
micro-batch size or the number of reading threads; those only slice it.

Positions are cut into blocks of `BLOCK`. In each block domain d has floor(BLOCK share_d) places and at most one more:
the places left over are dealt by systematic sampling at an offset that moves by the golden ratio from block to block,
so shares are exact in the long run and nearly so in every block. Which places they are is a permutation drawn from
(seed, block). The k-th row that a domain ever gives is row permutation[k mod N] of pass k div N, a permutation drawn
from (seed, domain, pass): no row comes a second time before all others of its domain have come once.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache

import numpy as np

BLOCK = 4096
GOLDEN = (5**0.5 - 1) / 2  # multiples of it fill [0, 1) most evenly


class Order:
    """Order over domains with `rows[d]` rows each, mixed by `shares[d]` (they are normalised; 0 leaves a domain out)."""

    def __init__(self, rows: list[int], shares: list[float], seed: int) -> None:
        total = sum(shares)
        self.rows, self.seed = list(rows), seed
        self.shares = [share / total for share in shares]
        self._block = lru_cache(maxsize=4)(self._draw_block)
        self._pass = lru_cache(maxsize=4 * len(rows))(self._draw_pass)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(domain, row of that domain) at a global position >= 0."""
        domains, counts = self._block(position // BLOCK)
        place = position % BLOCK
        domain, nth = int(domains[place]), int(counts[place])
        return domain, int(self._pass(domain, nth // self.rows[domain])[nth % self.rows[domain]])

    def given(self, blocks: int) -> np.ndarray:
        """int64 [domains]: rows given by each domain in the first `blocks` blocks; sums to blocks * BLOCK."""
        return self._amounts(np.arange(blocks)).sum(axis=0)

    def _amounts(self, blocks: np.ndarray) -> np.ndarray:
        """int64 [blocks, domains]: places of each domain in each of the given blocks; rows sum to BLOCK."""
        exact = np.array(self.shares) * BLOCK
        whole = np.floor(exact + 1e-9).astype(np.int64)
        edges = np.concatenate(([0.0], np.cumsum(exact - whole)))
        edges[-1] = BLOCK - whole.sum()
        offsets = np.mod((blocks + 1) * GOLDEN, 1.0)
        return whole + np.diff(np.ceil(edges - offsets[:, None]), axis=1).astype(np.int64)

    def _draw_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(domain of each place, how many rows that domain gave before it), int64 [BLOCK] each."""
        amounts = self._amounts(np.array([block]))[0]
        domains = np.repeat(np.arange(len(self.rows)), amounts)[self._generator(0, block).permutation(BLOCK)]
        counts = np.empty(BLOCK, dtype=np.int64)
        for domain, start in enumerate(self.given(block)):
            places = np.flatnonzero(domains == domain)
            counts[places] = start + np.arange(len(places))
        return domains, counts

    def _draw_pass(self, domain: int, number: int) -> np.ndarray:
        return self._generator(1 + domain, number).permutation(self.rows[domain])

    def _generator(self, stream: int, number: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, stream], counter=[0, 0, 0, number]))

    def fingerprint(self, dataset: str) -> str:
        """Hash of everything the order is a function of, the dataset's own fingerprint included."""
        inputs = json.dumps([dataset, self.seed, self.rows, self.shares, BLOCK])
        return hashlib.sha256(inputs.encode()).hexdigest()
