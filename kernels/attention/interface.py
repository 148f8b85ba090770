"""The attention call: checks, choice of implementation, and the table of those there are."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from kernels.attention import flash, reference, sdpa, triton_attention
from kernels.attention.documents import PackedSequences, Packing
from kernels.attention.features import asked
from kernels.autocast import autocast
from kernels.choice import Implementation, choose

IMPLEMENTATIONS = {
    i.name: i
    for i in (
        reference.IMPLEMENTATION,
        sdpa.IMPLEMENTATION,
        flash.IMPLEMENTATION,
        triton_attention.IMPLEMENTATION,
    )
}
# On CUDA ours comes after SDPA as long as it has not run on a GPU (bench/PENDING.md); on a CPU it
# would be interpreted.
AUTO_ORDER = {"cuda": ("sdpa", "triton", "reference"), "cpu": ("sdpa", "reference")}


def choose_attention(name: str, device: str, features: set[str]) -> Implementation:
    """The implementation for a device and a set of features ("documents", "window", "softcap", "sinks", "lse" and those of features.py)."""
    return choose(
        IMPLEMENTATIONS, AUTO_ORDER.get(device, AUTO_ORDER["cpu"]), name, device, features
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: Packing | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention, softmax(scale q k^T) v, aligned bottom-right when there are fewer queries than keys.

    q [B, Sq, Hq, D]; k [B, Sk, Hkv, D]; v [B, Sk, Hkv, Dv]; one floating dtype. Hq is a multiple of
    Hkv: queries h * Hq/Hkv.. share key head h. documents: only tokens of one document see each
    other. window: keys a query sees, itself included. scale: 1/sqrt(D) unless given. softcap c:
    scores become c tanh(s / c). sinks [Hq]: learned logits that take part in the softmax and carry
    no value. Returns out [B, Sq, Hq, Dv] and, if asked, the natural-log log-sum-exp, fp32 [B, Hq,
    Sq], which is differentiable. A query that sees nothing gives 0 and -inf.

    Raises ValueError for shapes that do not fit and for what the named implementation cannot do.
    """
    q, k, v = autocast(q, k, v)
    _check(q, k, v, documents, window, softcap, sinks)
    features = asked(
        q,
        v,
        documents=documents,
        window=window,
        softcap=softcap,
        sinks=sinks,
        lse=return_lse or None,
    )
    chosen = choose_attention(implementation, q.device.type, features)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return chosen.run(
        q,
        k,
        v,
        documents=documents,
        window=window,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        return_lse=return_lse,
    )


def attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same for sequences one after another: q [Tq, Hq, D], k [Tk, Hkv, D], v [Tk, Hkv, Dv].

    cu_seqlens: int32 [sequences + 1], starts of the queries' sequences and their total;
    cu_seqlens_k: of the keys', the same unless given. options: as of `attention`. Returns out [Tq,
    Hq, Dv] and, if asked, lse [Hq, Tq]. Nothing is read on the host.
    """
    if not (q.dim() == k.dim() == v.dim() == 3):
        raise ValueError(
            f"q, k and v must be [T, H, D]; got q {tuple(q.shape)}, k {tuple(k.shape)}, v"
            f" {tuple(v.shape)}"
        )
    sequences = PackedSequences(
        cu_seqlens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, q.shape[0], k.shape[0]
    )
    found = attention(*(t.unsqueeze(0) for t in (q, k, v)), documents=sequences, **options)
    return tuple(t.squeeze(0) for t in found) if isinstance(found, tuple) else found.squeeze(0)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Packing | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not (q.dim() == k.dim() == v.dim() == 4):
        raise ValueError(f"q, k and v must be [B, S, H, D]; got {shapes}")
    if (
        k.shape[:3] != v.shape[:3]
        or q.shape[0] != k.shape[0]
        or q.shape[3] != k.shape[3]
        or 0 in (q.shape[3], v.shape[3], k.shape[2])
    ):
        raise ValueError(
            f"q [B, Sq, Hq, D], k [B, Sk, Hkv, D] and v [B, Sk, Hkv, Dv] do not fit: {shapes}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(
            f"q, k and v must have one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads")
    if documents is not None and documents.shape != (q.shape[0], q.shape[1], k.shape[1]):
        raise ValueError(
            f"documents of shape (rows, queries, keys) = {documents.shape} do not fit {shapes}"
        )
    if window is not None and window < 1:
        raise ValueError(f"window = {window} must be at least 1 (the token itself)")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap = {softcap} must be above 0")
    if sinks is not None and sinks.shape != (q.shape[2],):
        raise ValueError(f"sinks {tuple(sinks.shape)} must be [{q.shape[2]}], one per query head")
