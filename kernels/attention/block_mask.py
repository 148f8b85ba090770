"""The mask of FlexAttention, by blocks of queries and keys, from the intervals that queries see."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.attention.intervals import Intervals

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # queries, and keys, of a block


def build(intervals: Intervals) -> BlockMask:
    """Build the mask of R rows, or of one for all.

    A block of keys is partial where a query of the block may see a key of it, and full where every
    query sees every key, which needs no mask in the kernel. Time and memory grow with
    (S / 128)^2.
    """
    from torch.nn.attention.flex_attention import BlockMask  # imports torch's compiler

    first, last = intervals.first, intervals.last
    queries, keys = first.shape[1], intervals.query_start.shape[1]
    start = torch.arange(0, keys, BLOCK, dtype=torch.int32, device=first.device)
    # Queries beyond the last see nothing, and nobody sees a key beyond the last
    some = (_of_blocks(first, keys).amin(2) < start + BLOCK) & (
        _of_blocks(last, -1).amax(2) >= start
    )
    full = (_of_blocks(first, keys).amax(2) <= start) & (
        _of_blocks(last, -1).amin(2) >= start + BLOCK - 1
    )
    several = first.shape[0] > 1

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row = b if several else torch.zeros_like(b)
        return (k >= first[row, q]) & (k <= last[row, q])

    return BlockMask.from_kv_blocks(
        *_numbers(some & ~full),
        *_numbers(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(queries, keys),
    )


def _of_blocks(values: Tensor, fill: int) -> Tensor:
    """Values [R, Sq] of the queries of each block, [R, blocks, 128, 1]."""
    padded = F.pad(values, (0, -values.shape[1] % BLOCK), value=fill)
    return padded.view(values.shape[0], -1, BLOCK, 1)


def _numbers(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Counts of blocks of keys [R, 1, Qb] and their numbers [R, 1, Qb, Kb], those counted first."""
    order = blocks.to(torch.int32).argsort(dim=2, descending=True, stable=True)
    counts = blocks.sum(2, dtype=torch.int32)
    return counts.unsqueeze(1), order.to(torch.int32).unsqueeze(1)
