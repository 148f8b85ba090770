"""torch's scaled_dot_product_attention: fused on CPU and CUDA, with a dense mask for documents and windows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

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
    softcap: None,
    sinks: None,
    return_lse: bool,
) -> Tensor:
    """See kernels.attention.attention; no soft-cap, sinks or log-sum-exp."""
    queries, keys = q.shape[1], k.shape[1]
    plain = documents is None and window is None
    mask = None
    if not plain:
        mask = (
            causal_mask(queries, keys, window, q.device)
            if documents is None
            else documents.mask(window)
        )
    elif queries != keys and queries > 1:  # torch aligns its own causal mask top-left
        mask = causal_mask(queries, keys, None, q.device)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None and queries > 1,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)
    if queries > keys:  # the first queries see nothing; torch gives NaN or 0 there, by backend
        unseen = torch.arange(queries, device=q.device) < queries - keys
        out = out.masked_fill(unseen.view(1, -1, 1, 1), 0.0)
    return out


IMPLEMENTATION = Implementation(
    "sdpa", run, frozenset({"cpu", "cuda"}), frozenset({"documents", "window", *SHAPES_AND_TYPES})
)
