"""Attention calls: checks of the arguments, then the implementation that was chosen."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

from torch import Tensor

from kernels.attention import flash, flex, reference, sdpa, triton_attention
from kernels.attention.call import AttentionCall, AttentionOutput
from kernels.attention.documents import PackedDocuments, PackedSequences, Packing
from kernels.attention.intervals import Slices
from kernels.autocast import autocast
from kernels.choice import attention_features, choose_attention

FUNCTIONS = {
    "reference": reference.run,
    "sdpa": sdpa.run,
    "flash_attn": flash.run,
    "varlen": flash.run_torch,
    "flex": flex.run,
    "triton": triton_attention.run,
}


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query_offset: int | None = None,
    key_offset: int = 0,
    documents: Packing | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: Literal[False] = False,
    implementation: str = "auto",
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query_offset: int | None = None,
    key_offset: int = 0,
    documents: Packing | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: Literal[True],
    implementation: str = "auto",
) -> AttentionOutput: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query_offset: int | None = None,
    key_offset: int = 0,
    documents: Packing | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Tensor | AttentionOutput:
    """Causal attention, softmax(scale q k^T) v, of slices of a sequence.

    A query sees the keys whose positions are at most its own. One floating dtype.

    Args:
        q: [B, Sq, Hq, D].
        k: [B, Sk, Hkv, D]. Hq is a multiple of Hkv: queries h * Hq/Hkv.. share key head h.
        v: [B, Sk, Hkv, Dv].
        query_offset: position of the first query in the whole sequence. Unless it is given, the
            last query stands at the last key, as in decoding with a cache of keys.
        key_offset: position of the first key. Results over slices of keys are put together by
            their log-sum-exp; sinks belong to one of them then.
        documents: which tokens see each other: those of one document only.
        window: keys that a query sees, its own position included.
        scale: 1/sqrt(D) unless given.
        softcap: c of scores c tanh(s / c).
        sinks: [Hq], learned logits that take part in the softmax and carry no value.
        return_lse: return the log-sum-exp too.
        implementation: a name of `kernels.choice.ATTENTION`, or "auto".

    Returns:
        out [B, Sq, Hq, Dv], or an `AttentionOutput` with the natural log-sum-exp, which is
        differentiable. A query that sees nothing gives 0 and -inf.

    Raises:
        ValueError: shapes do not fit, or the implementation cannot do what is asked.
    """
    q, k, v = autocast(q, k, v)
    _check(q, k, v, window, softcap, sinks)
    slices = Slices.of(q.shape[1], k.shape[1], query_offset, key_offset)
    ids_alone = isinstance(documents, PackedDocuments) and not documents.has_cu_seqlens
    features = attention_features(
        q,
        v,
        documents=documents,
        window=window,
        softcap=softcap,
        sinks=sinks,
        lse=return_lse or None,
        offsets=None if slices.end_together else slices,
        **{"documents without cu_seqlens": ids_alone or None},
    )
    if documents is not None:
        documents.check(q.shape[0], slices)
    chosen = choose_attention(implementation, q.device.type, features)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    call = AttentionCall(slices, scale, documents, window, softcap, sinks, return_lse)
    output = FUNCTIONS[chosen.name](q, k, v, call)
    return output if return_lse else output.out


def attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None = None,
    **options: Any,
) -> Tensor | AttentionOutput:
    """Attention of sequences that stand one after another. Nothing is read on the host.

    Args:
        q: [Tq, Hq, D].
        k: [Tk, Hkv, D].
        v: [Tk, Hkv, Dv].
        cu_seqlens: int32 [sequences + 1], starts of the queries' sequences and their total.
        cu_seqlens_k: the same of the keys'; equal to `cu_seqlens` unless given.
        options: as of `attention`, without offsets.

    Returns:
        out [Tq, Hq, Dv], or an `AttentionOutput` with lse [Hq, Tq].
    """
    if not (q.dim() == k.dim() == v.dim() == 3):
        raise ValueError(
            f"q, k and v must be [T, H, D]; got q {tuple(q.shape)}, k {tuple(k.shape)}, v"
            f" {tuple(v.shape)}"
        )
    sequences = PackedSequences(
        cu_seqlens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, q.shape[0], k.shape[0]
    )
    rows = (t.unsqueeze(0) for t in (q, k, v))
    output: Tensor | AttentionOutput = attention(*rows, documents=sequences, **options)
    if isinstance(output, Tensor):
        return output.squeeze(0)
    return AttentionOutput(output.out.squeeze(0), None if output.lse is None else output.lse[0])


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    if window is not None and window < 1:
        raise ValueError(f"window = {window} must be at least 1 (the token itself)")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap = {softcap} must be above 0")
    if sinks is not None and sinks.shape != (q.shape[2],):
        raise ValueError(f"sinks {tuple(sinks.shape)} must be [{q.shape[2]}], one per query head")
