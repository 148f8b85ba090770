"""The flash_attn package, if it is installed.

Untested here: it cannot be built on a machine without CUDA.
"""

from __future__ import annotations

import importlib.util

from torch import Tensor

from kernels.attention.documents import Packing
from kernels.choice import Implementation


def _unavailable() -> str | None:
    return (
        None
        if importlib.util.find_spec("flash_attn")
        else "the package flash_attn is not installed"
    )


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: Packing | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: None,
    return_lse: bool,
) -> Tensor:
    """See kernels.attention.attention; no sinks or log-sum-exp."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    options = {
        "softmax_scale": scale,
        "causal": True,
        "softcap": softcap or 0.0,
        "window_size": (-1, -1) if window is None else (window - 1, 0),
    }
    if documents is None:
        return flash_attn_func(q, k, v, **options)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    out = flash_attn_varlen_func(*flat, *documents.cu_seqlens(), q.shape[1], k.shape[1], **options)
    return out.unflatten(0, q.shape[:2])


IMPLEMENTATION = Implementation(
    "flash_attn",
    run,
    frozenset({"cuda"}),
    frozenset({"documents", "window", "softcap"}),
    _unavailable,
)
