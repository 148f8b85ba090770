"""The flash_attn package (2.6 or later), where it is installed.

It has never run here: it cannot be built on a machine without CUDA. A test checks its arguments
with functions of the same signatures that compute by definition.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernels.attention.call import AttentionCall, AttentionOutput


def run(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionOutput:
    """Compute `kernels.attention.attention` without sinks and log-sum-exp.

    The package aligns the last query with the last key, of the rows or of each document.
    """
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    options: dict[str, Any] = {
        "softmax_scale": call.scale,
        "causal": True,
        "softcap": call.softcap or 0.0,
        "window_size": (-1, -1) if call.window is None else (call.window - 1, 0),
    }
    if call.documents is None:
        return AttentionOutput(flash_attn_func(q, k, v, **options), None)
    out = flash_attn_varlen_func(
        *(t.flatten(0, 1) for t in (q, k, v)),
        *call.documents.cu_seqlens(call.slices),
        q.shape[1],
        k.shape[1],
        **options,
    )
    return AttentionOutput(out.unflatten(0, q.shape[:2]), None)
