"""Ranks as threads of one process: torch.distributed's collectives that optimizers call, imitated.

For many layouts in little time. tests/distributed has real ranks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class ThreadGroup:
    """Stands for a process group, and for the module torch.distributed.

    Args:
        size: Number of ranks.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier, self._local = threading.Barrier(size), threading.local()
        self._slots: list[Any] = [None] * size

    def run(self, rank_function: Callable[[int], T]) -> list[T]:
        """Call rank_function(rank) on every rank; a failure of one ends all."""

        def start(rank: int) -> T:
            self._local.rank = rank
            try:
                return rank_function(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(start, range(self.size)))

    def get_rank(self, group: ThreadGroup) -> int:
        return self._local.rank

    def get_world_size(self, group: ThreadGroup) -> int:
        return self.size

    def _exchange(self, value: Any) -> list[Any]:
        self._slots[self._local.rank] = value
        self._barrier.wait()
        values = list(self._slots)
        self._barrier.wait()
        return values

    def all_gather(self, outputs: list[Tensor], tensor: Tensor, group: ThreadGroup) -> None:
        for output, value in zip(outputs, self._exchange(tensor), strict=True):
            output.copy_(value)

    def all_to_all_single(
        self,
        output: Tensor,
        tensor: Tensor,
        output_sizes: list[int],
        input_sizes: list[int],
        group: ThreadGroup,
    ) -> None:
        rank, parts = self._local.rank, list(torch.split(tensor, input_sizes))
        received = [sent[rank] for sent in self._exchange(parts)]
        assert [part.numel() for part in received] == output_sizes
        assert all(part.dtype == output.dtype for part in received)
        output.copy_(torch.cat(received))
        self._exchange(None)
