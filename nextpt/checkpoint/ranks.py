"""Exchanging small JSON values between ranks; torch's own object collectives pickle."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """A gloo group of all ranks for what is not training: it neither waits for the device nor competes with it.

    Built collectively; also works in a process that is not distributed.
    """

    def __init__(self) -> None:
        self.distributed = dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        self.world_size = dist.get_world_size() if self.distributed else 1
        self._group = dist.new_group(backend="gloo") if self.distributed else None

    def another(self) -> Ranks:
        """A second group of the same ranks, for another thread. Collective."""
        return Ranks()

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order of rank, on every rank. Collective."""
        if not self.distributed:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([data.numel()]), group=self._group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: data.numel()] = data
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(parts, padded, group=self._group)
        return [
            json.loads(part[: int(size)].numpy().tobytes())
            for part, size in zip(parts, sizes, strict=True)
        ]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Collective."""
        return self.any_of(flag)[0]

    def any_of(self, *flags: bool) -> list[bool]:
        """`any` of several flags in one exchange. Collective."""
        if self.world_size == 1:
            return list(flags)
        found = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._group)
        return [bool(flag) for flag in found.numpy()]

    def from_first(self, value: Any) -> Any:
        """Rank 0's value on every rank. Collective."""
        return self.gather(value if self.rank == 0 else None)[0]
