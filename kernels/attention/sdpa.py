"""torch's scaled_dot_product_attention: fused on CPU and CUDA, with a dense mask where needed.

On CUDA torch's math backend, which writes all scores, is never used: where no other can do what
is asked, torch raises.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.attention.call import AttentionCall, AttentionOutput


def run(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionOutput:
    """Compute `kernels.attention.attention` without soft cap, sinks and log-sum-exp."""
    slices = call.slices
    plain = call.documents is None and call.window is None
    square = slices.queries == slices.keys and slices.end_together
    # torch aligns its own causal mask at the first query and key
    is_causal = plain and square and slices.queries > 1
    needs_mask = not (plain and (square or (slices.queries == 1 and slices.end_together)))
    mask = call.mask(q.device) if needs_mask else None
    group = q.shape[2] // k.shape[2]
    if q.device.type == "cuda" and group > 1 and (needs_mask or q.dtype == torch.float32):
        # Only its memory-efficient backend does that, and it has no grouped queries
        k, v = (t.repeat_interleave(group, 2) for t in (k, v))
    with _backends(q.device.type):
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=is_causal,
            scale=call.scale,
            enable_gqa=q.shape[2] != k.shape[2],
        ).transpose(1, 2)
    if mask is not None and not slices.see_themselves:
        # Queries that see nothing: torch gives NaN or 0, by backend
        unseen = ~mask.any(-1).squeeze(1)
        out = out.masked_fill(unseen[:, :, None, None], 0.0)
    return AttentionOutput(out, None)


def _backends(device: str) -> AbstractContextManager[None]:
    if device != "cuda":
        return nullcontext()
    return sdpa_kernel(
        [
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
        ]
    )
