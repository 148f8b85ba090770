"""Order of one domain's sequences: epochs over its shards, shuffled in windows of shards.

Draw k of a domain (its k-th sequence over the whole run, from 0) belongs to epoch k div N, where N
is the number of its sequences. An epoch permutes the shards and cuts them into windows of WINDOW;
the sequences of a window's shards are permuted together. So an epoch is a permutation of all
sequences, reading it touches few shards at a time, and any draw is located by drawing one window.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from nextpt.data.permutation import permutation

# Shards. 16 of 64 MB are a quarter of a million sequences of 2048 tokens; MosaicML's py1e shuffles
# as many by default (its block size is 2^18 samples). 1 GB stays in the page cache.
WINDOW = 16
_SHARDS, _SEQUENCES = 0, 1  # purpose of a draw

_Int32s = npt.NDArray[np.int32]
_Int64s = npt.NDArray[np.int64]


class DomainOrder:
    """Order over sequences 0..N-1 that lie in consecutive shards.

    Memory: O(shards) and a few windows of sequences.

    Args:
        shard_sizes: Sequences of each shard, int [shards].
        seed: Seed of the run.
        stream: Random stream of the domain, > 0.
    """

    def __init__(self, shard_sizes: npt.NDArray[np.int64], seed: int, stream: int) -> None:
        self._shard_sizes = np.asarray(shard_sizes, np.int64)
        self._starts = np.concatenate(([0], np.cumsum(self._shard_sizes, dtype=np.int64)))
        self.total = int(self._starts[-1])
        self._seed = seed
        self._stream = stream
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)
        self._window = lru_cache(maxsize=3)(self._draw_window)

    def sequences(self, draws: _Int64s) -> _Int64s:
        """Sequences of the domain at rising draws: int64 [n] -> int64 [n]."""
        sequences, start = np.empty(len(draws), np.int64), 0
        while start < len(draws):
            epoch, window, begin, end = self._locate(int(draws[start]))
            stop = int(np.searchsorted(draws, end))
            shuffled, shifts, begins = self._window(epoch, window)
            local = shuffled[draws[start:stop] - begin].astype(np.int64)
            shard = np.searchsorted(begins, local, side="right") - 1
            sequences[start:stop] = local + shifts[shard]
            start = stop
        return sequences

    def shards_ahead(self, draw: int, windows: int) -> tuple[list[int], int]:
        """Shards of the window that holds a draw, and of those after it.

        Args:
            draw: Index of the draw.
            windows: How many windows, the one of the draw included.

        Returns:
            The shards in the order of reading, and the first draw after the first window.
        """
        shards: list[int] = []
        first_end: int | None = None
        for _ in range(windows):
            epoch, window, _, draw = self._locate(draw)
            first_end = first_end or draw
            shards += self._epoch(epoch)[0][WINDOW * window : WINDOW * (window + 1)].tolist()
        return shards, first_end or draw

    def _locate(self, draw: int) -> tuple[int, int, int, int]:
        """(epoch, window, first draw of the window, first draw after it) of a draw."""
        epoch, within = divmod(draw, self.total)
        edges = self._epoch(epoch)[1]
        window = int(np.searchsorted(edges, within, side="right")) - 1
        start = epoch * self.total
        return epoch, window, start + int(edges[window]), start + int(edges[window + 1])

    def _draw_epoch(self, epoch: int) -> tuple[_Int32s, _Int64s]:
        """(non-empty shards in their order, sequences before each window and in all)."""
        counter = (epoch, 0, _SHARDS)
        shards = permutation(len(self._shard_sizes), self._seed, self._stream, counter)
        shards = shards[self._shard_sizes[shards] > 0]
        ends = np.cumsum(self._shard_sizes[shards])
        last = ends[-1:] if len(shards) % WINDOW else ends[:0]
        edges = np.concatenate((np.zeros(1, np.int64), ends[WINDOW - 1 :: WINDOW], last))
        return shards.astype(np.int32), edges

    def _draw_window(self, epoch: int, window: int) -> tuple[_Int32s, _Int64s, _Int64s]:
        """Order of the sequences of a window.

        Returns:
            Sequences in their order, numbered through the window's shards; what to add to such a
            number for each shard; the first number of each shard and their total.
        """
        shards = self._epoch(epoch)[0][WINDOW * window : WINDOW * (window + 1)]
        begins = np.concatenate(([0], np.cumsum(self._shard_sizes[shards])))
        counter = (epoch, window, _SEQUENCES)
        shuffled = permutation(int(begins[-1]), self._seed, self._stream, counter)
        return shuffled.astype(np.int32), self._starts[shards] - begins[:-1], begins
