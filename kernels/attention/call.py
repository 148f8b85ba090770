"""Arguments of an attention call beside q, k and v, as every implementation takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kernels.attention import block_mask
from kernels.attention.documents import Packing
from kernels.attention.intervals import Intervals, Slices, cached_causal

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class AttentionOutput(NamedTuple):
    """Result of attention.

    Attributes:
        out: [B, Sq, Hq, Dv], in the dtype of the queries.
        lse: natural log-sum-exp of the scores, fp32 [B, Hq, Sq]; None where it was not asked for.
    """

    out: Tensor
    lse: Tensor | None


class AttentionCall(NamedTuple):
    """What a call asks for; see `kernels.attention.attention`."""

    slices: Slices
    scale: float
    documents: Packing | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    return_lse: bool = False

    def intervals(self, device: torch.device) -> Intervals:
        """Return the keys that every query sees."""
        if self.documents is None:
            return cached_causal(self.slices, self.window, device)
        return self.documents.intervals(self.slices, self.window)

    def mask(self, device: torch.device) -> Tensor:
        """Return the boolean mask [B or 1, 1, Sq, Sk], True where a query sees a key."""
        if self.documents is None:
            return self.intervals(device).mask()
        return self.documents.mask(self.slices, self.window)

    def block_mask(self, device: torch.device) -> BlockMask:
        """Return FlexAttention's mask of the keys that every query sees."""
        if self.documents is None:
            return block_mask.build(self.intervals(device))
        return self.documents.block_mask(self.slices, self.window)
