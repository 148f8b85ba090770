"""Attention in plain torch, everything in fp32 (fp64 for fp64 inputs): the definition that others are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention.documents import Packing, causal_mask
from kernels.attention.features import SHAPES_AND_TYPES
from kernels.choice import Implementation


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: Packing | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """See kernels.attention.attention.

    Differentiable in q, k, v, sinks, also through the log-sum-exp.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[2] // k.shape[2]
    scores = (
        torch.einsum("bqhd,bkhd->bhqk", q.to(wide), k.to(wide).repeat_interleave(group, 2)) * scale
    )
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    mask = (
        causal_mask(q.shape[1], k.shape[1], window, q.device)
        if documents is None
        else documents.mask(window)
    )
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        column = sinks.to(wide).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        lse = torch.cat((scores, column), dim=-1).logsumexp(-1)
    else:
        lse = scores.logsumexp(-1)
    # A query that sees nothing: -inf - -inf would be NaN, in the gradient too.
    seen = mask.any(-1, keepdim=True)
    finite = torch.where(seen.squeeze(-1), lse, 0.0) if sinks is None else lse
    weights = torch.where(
        mask, (scores.masked_fill(~mask, 0.0) - finite.unsqueeze(-1)), -torch.inf
    ).exp()
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v.to(wide).repeat_interleave(group, 2)).to(
        q.dtype
    )
    return (out, lse) if return_lse else out


IMPLEMENTATION = Implementation(
    "reference",
    run,
    frozenset({"cpu", "cuda"}),
    frozenset({"documents", "window", "softcap", "sinks", "lse", *SHAPES_AND_TYPES}),
)
