"""Reference attention in plain torch, fp32 or wider: the definition that others are tested with."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention.call import AttentionCall, AttentionOutput


def run(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionOutput:
    """Compute `kernels.attention.attention` in fp32, and in fp64 for fp64 inputs.

    Differentiable in q, k, v and the sinks, also through the log-sum-exp.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[2] // k.shape[2]
    k, v = (t.to(wide).repeat_interleave(group, 2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), k) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    mask = call.mask(q.device)
    scores = scores.masked_fill(~mask, -torch.inf)
    logits, sees = scores, mask.any(-1)
    if call.sinks is not None:
        sinks = call.sinks.to(wide).view(1, -1, 1)
        logits = torch.cat((scores, sinks.unsqueeze(-1).expand(*scores.shape[:3], 1)), dim=-1)
        sees = sees | (sinks > -torch.inf)
    # A query that sees nothing: -inf - -inf would be NaN, in the gradient too.
    finite = torch.where(sees.unsqueeze(-1), logits, 0.0).logsumexp(-1)
    lse = torch.where(sees, finite, -torch.inf)
    shifted = scores.masked_fill(~mask, 0.0) - finite.unsqueeze(-1)
    weights = torch.where(mask, shifted, -torch.inf).exp()
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v).to(q.dtype)
    return AttentionOutput(out, lse)
