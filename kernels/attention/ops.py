"""torch.library operators around the Triton kernels, with shapes, derivatives and FLOPs.

An operator's schema is read from its signature, which takes tensors and numbers only: so the
arguments of both passes are spelled out, and become `launch.Inputs` inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.attention import launch
from kernels.attention.intervals import Intervals


@torch.library.custom_op("nextpt::causal_attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    first: Tensor,
    last: Tensor,
    query_start: Tensor,
    query_stop: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute out [B, Sq, Hq, Dv], and the fields of `launch.Statistics`, fp32 [B, Hq, Sq].

    The four index tensors are `Intervals`; softcap 0: none.
    """
    intervals = Intervals(first, last, query_start, query_stop)
    out, statistics = launch.forward(launch.Inputs(q, k, v, sinks, intervals, scale, softcap))
    return out, *statistics


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    rows, queries, heads = q.shape[:3]
    statistics = [q.new_empty(rows, heads, queries, dtype=torch.float32) for _ in range(3)]
    return q.new_empty(rows, queries, heads, v.shape[3]), *statistics


@torch.library.custom_op("nextpt::causal_attention_backward", mutates_args=())
def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    first: Tensor,
    last: Tensor,
    query_start: Tensor,
    query_stop: Tensor,
    scale: float,
    softcap: float,
    out: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k, v and sinks, the last empty without. No second derivative."""
    intervals = Intervals(first, last, query_start, query_stop)
    inputs = launch.Inputs(q, k, v, sinks, intervals, scale, softcap)
    return launch.backward(inputs, out, peak, log_sum, d_out, d_lse)


@attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    gradients = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
    return (*gradients, q.new_empty(0) if sinks is None else torch.empty_like(sinks))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out, _, peak, log_sum = output
    ctx.mark_non_differentiable(peak, log_sum)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:8], out, peak, log_sum)
    ctx.options = inputs[8:]


def _backward(
    ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    *inputs, out, peak, log_sum = ctx.saved_tensors
    if d_out is None and d_lse is None:
        return (None,) * 10
    if d_out is None:
        d_out = torch.zeros_like(out)
    dq, dk, dv, d_sinks = attention_backward(
        *inputs, *ctx.options, out, peak, log_sum, d_out, d_lse
    )
    return (dq, dk, dv, d_sinks if inputs[3] is not None else None, *[None] * 6)


attention.register_autograd(_backward, setup_context=_keep)


def _causal_pairs(queries: int, keys: int) -> int:
    """Pairs of a query and a key that it sees, where both end together.

    Offsets, documents and windows are not known from shapes.
    """
    seeing = min(queries, keys)
    return seeing * keys - seeing * (seeing - 1) // 2


@register_flop_formula(torch.ops.nextpt.causal_attention)
def _flops(
    q_shape: Sequence[int], k_shape: Sequence[int], v_shape: Sequence[int], *_: Any, **__: Any
) -> int:
    rows, queries, heads, width = q_shape
    return 2 * rows * heads * _causal_pairs(queries, k_shape[1]) * (width + v_shape[3])


@register_flop_formula(torch.ops.nextpt.causal_attention_backward)
def _backward_flops(
    q_shape: Sequence[int], k_shape: Sequence[int], v_shape: Sequence[int], *_: Any, **__: Any
) -> int:
    """Five products, as the literature counts, not the seven that are computed."""
    rows, queries, heads, width = q_shape
    return 2 * rows * heads * _causal_pairs(queries, k_shape[1]) * (3 * width + 2 * v_shape[3])
