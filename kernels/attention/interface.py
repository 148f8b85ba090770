"""The attention call: checks, choice of implementation, and the table of those there are."""

from __future__ import annotations

import math

from torch import Tensor

from kernels.attention import flash, reference, sdpa
from kernels.attention.documents import PackedDocuments
from kernels.choice import Implementation, choose

IMPLEMENTATIONS = {i.name: i for i in (reference.IMPLEMENTATION, sdpa.IMPLEMENTATION, flash.IMPLEMENTATION)}
# Our Triton kernel will come first on CUDA. What SDPA lacks, the reference does.
AUTO_ORDER = ("sdpa", "reference")


def choose_attention(name: str, device: str, features: set[str]) -> Implementation:
    """The implementation for a device and a set of features ("documents", "window", "softcap", "sinks", "lse")."""
    return choose(IMPLEMENTATIONS, AUTO_ORDER, name, device, features)


def attention(q: Tensor, k: Tensor, v: Tensor, *, documents: PackedDocuments | None = None, window: int | None = None,
              scale: float | None = None, softcap: float | None = None, sinks: Tensor | None = None,
              return_lse: bool = False, implementation: str = "auto") -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention, softmax(scale q k^T) v, aligned bottom-right when there are fewer queries than keys.

    q [B, Sq, Hq, D]; k [B, Sk, Hkv, D]; v [B, Sk, Hkv, Dv]; one floating dtype. Hq is a multiple of Hkv: queries
    h * Hq/Hkv.. share key head h. documents: only tokens of one document see each other (then Sq = Sk). window: keys
    a query sees, itself included. scale: 1/sqrt(D) unless given. softcap c: scores become c tanh(s / c). sinks [Hq]:
    learned logits that take part in the softmax and carry no value. Returns out [B, Sq, Hq, Dv] and, if asked,
    the natural-log log-sum-exp, fp32 [B, Hq, Sq]. A query that sees nothing gives 0 and -inf.

    Raises ValueError for shapes that do not fit and for what the named implementation cannot do.
    """
    _check(q, k, v, documents, window, sinks)
    asked = {"documents": documents, "window": window, "softcap": softcap, "sinks": sinks, "lse": return_lse or None}
    features = {name for name, value in asked.items() if value is not None}
    chosen = choose_attention(implementation, q.device.type, features)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return chosen.run(q, k, v, documents=documents, window=window, scale=scale, softcap=softcap, sinks=sinks,
                      return_lse=return_lse)


def _check(q: Tensor, k: Tensor, v: Tensor, documents: PackedDocuments | None, window: int | None,
           sinks: Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not (q.dim() == k.dim() == v.dim() == 4):
        raise ValueError(f"q, k and v must be [B, S, H, D]; got {shapes}")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q [B, Sq, Hq, D], k [B, Sk, Hkv, D] and v [B, Sk, Hkv, Dv] do not fit: {shapes}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads")
    if documents is not None and (q.shape[:2] != documents.document_ids.shape or k.shape[1] != q.shape[1]):
        raise ValueError(f"document_ids {tuple(documents.document_ids.shape)} do not fit {shapes}")
    if window is not None and window < 1:
        raise ValueError(f"window = {window} must be at least 1 (the token itself)")
    if sinks is not None and sinks.shape != (q.shape[2],):
        raise ValueError(f"sinks {tuple(sinks.shape)} must be [{q.shape[2]}], one per query head")
