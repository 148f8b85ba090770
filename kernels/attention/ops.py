"""torch.library operators around the Triton kernels: opaque to torch.compile, with shapes, derivatives and FLOPs registered."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.attention import launch
from kernels.attention.intervals import Intervals


@torch.library.custom_op("nextpt::attention", mutates_args=())
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
) -> tuple[Tensor, Tensor]:
    """(out [B, Sq, Hq, Dv], natural lse fp32 [B, Hq, Sq]).

    The four index tensors are `Intervals`; softcap 0: none.
    """
    return launch.forward(
        q, k, v, sinks, Intervals(first, last, query_start, query_stop), scale, softcap
    )


@attention.register_fake
def _(q, k, v, sinks, first, last, query_start, query_stop, scale, softcap):
    rows, queries, heads, _ = q.shape
    return q.new_empty(rows, queries, heads, v.shape[3]), q.new_empty(
        rows, heads, queries, dtype=torch.float32
    )


@torch.library.custom_op("nextpt::attention_backward", mutates_args=())
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
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, d_sinks), the last empty without sinks. No second derivative."""
    return launch.backward(
        q,
        k,
        v,
        sinks,
        Intervals(first, last, query_start, query_stop),
        scale,
        softcap,
        out,
        lse,
        d_out,
        d_lse,
    )


@attention_backward.register_fake
def _(q, k, v, sinks, first, last, query_start, query_stop, scale, softcap, out, lse, d_out, d_lse):
    made = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
    return (*made, q.new_empty(0) if sinks is None else torch.empty_like(sinks))


def _keep(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:8], *output)
    ctx.options = inputs[8:]


def _backward(ctx, d_out, d_lse):
    *inputs, out, lse = ctx.saved_tensors
    nothing = [None] * 10
    if d_out is None and d_lse is None:
        return tuple(nothing)
    if d_out is None:
        d_out = torch.zeros_like(out)
    dq, dk, dv, d_sinks = attention_backward(*inputs, *ctx.options, out, lse, d_out, d_lse)
    return (dq, dk, dv, d_sinks if inputs[3] is not None else None, *nothing[4:])


attention.register_autograd(_backward, setup_context=_keep)


def _causal_pairs(queries: int, keys: int) -> int:
    """Pairs of a query and a key that it sees, aligned bottom-right.

    Documents and windows are not known from shapes.
    """
    seeing = min(queries, keys)
    return seeing * keys - seeing * (seeing - 1) // 2


@register_flop_formula(torch.ops.nextpt.attention)
def _flops(q_shape, k_shape, v_shape, *_, **__) -> int:
    rows, queries, heads, width = q_shape
    return 2 * rows * heads * _causal_pairs(queries, k_shape[1]) * (width + v_shape[3])


@register_flop_formula(torch.ops.nextpt.attention_backward)
def _backward_flops(q_shape, k_shape, v_shape, *_, **__) -> int:
    """Five products, as the literature counts, not the seven that are made."""
    rows, queries, heads, width = q_shape
    return 2 * rows * heads * _causal_pairs(queries, k_shape[1]) * (3 * width + 2 * v_shape[3])
