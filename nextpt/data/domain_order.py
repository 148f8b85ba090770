"""The order of one domain's rows: passes over its shards, in windows of shards that are shuffled together.

The k-th row that a domain ever gives belongs to pass k div N, N its rows. A pass permutes the
shards and cuts them into windows of WINDOW; the rows of a window's shards are permuted together. So
a pass is a permutation of all rows, reading it touches few shards at a time, and any place in it is
reached by drawing one window.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from nextpt.data.permutation import permutation

# SequenceSource of 16 shards of 64 MB, at 2048 tokens a quarter of a million, are mixed well enough;
# MosaicML's py1e shuffles as many by default (its block size is 2^18 samples). 1 GB stays in the
# page cache.
WINDOW = 16
SHARDS, ROWS = 0, 1  # what a draw is for


class DomainOrder:
    """GlobalOrder over rows 0..N-1 that lie in shards of `samples` rows each, one shard after another.

    Memory: O(shards) and a few windows of rows. stream: the domain's own, > 0.
    """

    def __init__(self, samples: np.ndarray, seed: int, stream: int) -> None:
        self.starts = np.concatenate(([0], np.cumsum(samples, dtype=np.int64)))
        self.rows_in_all = int(self.starts[-1])
        self._samples, self._seed, self._stream = np.asarray(samples, np.int64), seed, stream
        self._pass = lru_cache(maxsize=2)(self._draw_pass)
        self._window = lru_cache(maxsize=3)(self._draw_window)

    def rows(self, nths: np.ndarray) -> np.ndarray:
        """int64 [n]: the rows that this domain gives as its nths-th, counted from 0. nths: int64 [n], rising."""
        found, done = np.empty(len(nths), np.int64), 0
        while done < len(nths):
            number, window, begin, end = self._place(int(nths[done]))
            upto = int(np.searchsorted(nths, end))
            drawn, shifts, begins = self._window(number, window)
            local = drawn[nths[done:upto] - begin].astype(np.int64)
            found[done:upto] = local + shifts[np.searchsorted(begins, local, side="right") - 1]
            done = upto
        return found

    def shards_ahead(self, nth: int, windows: int) -> tuple[list[int], int]:
        """(shards of the window that holds the nth row and of those after it, `windows` in all, as they will be needed; where it ends)."""
        found: list[int] = []
        end = None
        for _ in range(windows):
            number, window, _, nth = self._place(nth)
            end = end or nth
            found += self._pass(number)[0][WINDOW * window : WINDOW * (window + 1)].tolist()
        return found, end or nth

    def _place(self, nth: int) -> tuple[int, int, int, int]:
        """(pass, window, first row given of that window, first after it) for the nth row."""
        number, within = divmod(nth, self.rows_in_all)
        edges = self._pass(number)[1]
        window = int(np.searchsorted(edges, within, side="right")) - 1
        start = number * self.rows_in_all
        return number, window, start + int(edges[window]), start + int(edges[window + 1])

    def _draw_pass(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(shards in their order int32, rows before each window and in all int64)."""
        shards = permutation(
            len(self._samples), self._seed, self._stream, (number, 0, SHARDS)
        ).astype(np.int32)
        shards = shards[self._samples[shards] > 0]
        ends = np.cumsum(self._samples[shards])
        last = ends[-1:] if len(shards) % WINDOW else ends[:0]
        return shards, np.concatenate((np.zeros(1, np.int64), ends[WINDOW - 1 :: WINDOW], last))

    def _draw_window(self, number: int, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rows counted through the window's shards, in their order, int32.

        What to add per shard; where shards begin).
        """
        shards = self._pass(number)[0][WINDOW * window : WINDOW * (window + 1)]
        begins = np.concatenate(([0], np.cumsum(self._samples[shards])))
        drawn = permutation(
            int(begins[-1]), self._seed, self._stream, (number, window, ROWS)
        ).astype(np.int32)
        return drawn, self.starts[shards] - begins[:-1], begins
