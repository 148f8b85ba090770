"""FlashAttention over packed sequences: torch's own, and the flash_attn package (2.6 or later).

Neither has run here: they need a GPU. A test checks their arguments with functions of the same
signatures that compute by definition.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from kernels.attention.call import AttentionCall, AttentionOutput


def run(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionOutput:
    """Compute `kernels.attention.attention` by the package, without sinks and log-sum-exp.

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


def run_torch(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionOutput:
    """Compute `kernels.attention.attention` by torch.nn.attention.varlen.

    Without soft cap, sinks and log-sum-exp; it aligns sequences as the package does.
    """
    from torch.nn.attention.varlen import varlen_attn  # imports torch's compiler

    if call.documents is not None:
        starts = call.documents.cu_seqlens(call.slices)
    else:
        rows = torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device)
        starts = rows * q.shape[1], rows * k.shape[1]
    options: dict[str, Any] = {
        "scale": call.scale,
        "window_size": (-1 if call.window is None else call.window - 1, 0),
    }
    group = q.shape[2] // k.shape[2]
    if _has_option("enable_gqa"):  # torch 2.12
        options["enable_gqa"] = group > 1
    elif group > 1:
        k, v = (t.repeat_interleave(group, 2) for t in (k, v))
    attend: Any = varlen_attn  # its arguments differ between versions
    flat = (t.flatten(0, 1) for t in (q, k, v))
    out = attend(*flat, *starts, q.shape[1], k.shape[1], **options)
    return AttentionOutput(out.unflatten(0, q.shape[:2]), None)


def _has_option(name: str) -> bool:
    """Whether varlen_attn has an argument of that name."""
    from torch.nn.attention.varlen import varlen_attn

    return name in inspect.signature(varlen_attn).parameters


# torch.compile asks instead of tracing it; see triton_attention.failure_on_gpu
_has_option.__dict__["_dynamo_marked_constant"] = True


def torch_unavailable() -> str | None:
    """Return why `run_torch` cannot be used with this torch, or None."""
    if not _has_option("scale"):
        return f"varlen_attn of torch {torch.__version__} has no scale and no window (2.11 has)"
    return None
