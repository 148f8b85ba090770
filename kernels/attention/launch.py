"""Launches of the attention kernels, and the tiles that they are launched with."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kernels.attention.backward_triton import delta_kernel, keys_kernel, queries_kernel
from kernels.attention.forward_triton import forward_kernel
from kernels.attention.intervals import Intervals
from kernels.attention.tiles_triton import Shape


class Tile(NamedTuple):
    """Queries, keys, warps and pipeline stages of one program."""

    m: int
    n: int
    warps: int
    stages: int


# By width of a head (up to), for 16-bit types on sm_90: no spills, no serialised wgmma, see
# kernels.bench.compile_report.
FORWARD = {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 2)}
KEYS = {64: Tile(32, 128, 8, 2), 128: Tile(32, 128, 8, 2), 256: Tile(32, 32, 8, 1)}
KEYS_CAPPED = {64: Tile(32, 128, 8, 2), 128: Tile(32, 64, 8, 1), 256: Tile(32, 32, 8, 1)}
QUERIES = {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(128, 16, 8, 2)}
WIDE = Tile(16, 16, 8, 1)  # fp32, whose exact products do not use tensor cores
DELTA_QUERIES = 64  # of a program


class Inputs(NamedTuple):
    """What both passes read.

    Attributes:
        q: [B, Sq, Hq, D].
        k: [B, Sk, Hkv, D].
        v: [B, Sk, Hkv, Dv].
        sinks: [Hq] or None.
        intervals: keys that queries see.
        scale: of the scores.
        softcap: of the scores; 0 for none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    intervals: Intervals
    scale: float
    softcap: float

    def with_rows(self) -> Inputs:
        """Return the inputs with `rows_of` q, k and v."""
        return self._replace(q=rows_of(self.q), k=rows_of(self.k), v=rows_of(self.v))


class OutputGradients(NamedTuple):
    """What the kernels of the backward pass read of the forward pass and from above.

    Attributes:
        d_out: gradient of out, [B, Sq, Hq, Dv].
        lse: natural log-sum-exp, fp32 [B, Hq, Sq].
        delta: rowsum(out d_out) - d_lse, fp32 [B, Hq, Sq].
    """

    d_out: Tensor
    lse: Tensor
    delta: Tensor


def padded(width: int) -> int:
    """Return the width of tiles: a power of two, at least what tl.dot takes."""
    return max(16, int(triton.next_power_of_2(width)))


def tile_for(table: dict[int, Tile], q: Tensor, v: Tensor) -> Tile:
    """Return the tile for the types and widths of q and v."""
    if q.element_size() > 2:
        return WIDE
    width = max(q.shape[3], v.shape[3])
    return next(tile for limit, tile in sorted(table.items()) if width <= limit)


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Launch the forward pass; returns (out [B, Sq, Hq, Dv], natural lse fp32 [B, Hq, Sq])."""
    q, k, v, sinks, intervals, scale, softcap = inputs.with_rows()
    rows, queries, heads, _ = q.shape
    out = q.new_empty(rows, queries, heads, v.shape[3])
    lse = q.new_empty(rows, heads, queries, dtype=torch.float32)
    if not lse.numel():
        return out, lse
    tile = tile_for(FORWARD, q, v)
    forward_kernel[(triton.cdiv(queries, tile.m), heads, rows)](
        *(q, k, v, out, lse, intervals.first, intervals.last, lse if sinks is None else sinks),
        *(strides(t) for t in (q, k, v, out)),
        *(_row_stride(intervals.first), queries, k.shape[1], heads, scale, softcap or 1.0),
        HAS_SINKS=sinks is not None,
        SHAPE=shape_of(q, k, v, softcap, tile),
        **compiler_options(tile),
    )
    return out, lse


def backward(
    inputs: Inputs, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward pass.

    Args:
        inputs: of `forward`.
        out: result of `forward`.
        lse: result of `forward`.
        d_out: gradient of `out`.
        d_lse: gradient of `lse`, or None.

    Returns:
        Gradients of q, k, v and the sinks, the last empty without sinks.
    """
    inputs, d_out = inputs.with_rows(), rows_of(d_out)
    q, k, v, sinks = inputs[:4]
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    d_sinks = q.new_empty(0) if sinks is None else torch.zeros_like(sinks)
    if not lse.numel() or not k.shape[1]:
        return dq.zero_(), dk.zero_(), dv.zero_(), d_sinks
    delta = _delta(out, lse, d_out, d_lse)
    gradients = OutputGradients(d_out, lse, delta)
    _launch_keys(inputs, gradients, dk, dv)
    _launch_queries(inputs, gradients, dq)
    if sinks is not None:  # a sink is a key without value: ds = p (0 - delta)
        p = torch.exp(sinks.float().view(1, -1, 1) - lse)
        d_sinks = -(p * delta).sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, d_sinks


def _delta(out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None) -> Tensor:
    """rowsum(out d_out) - d_lse, fp32 [B, Hq, Sq]."""
    rows, queries, heads, width = out.shape
    delta = torch.empty_like(lse)
    delta_kernel[(triton.cdiv(queries, DELTA_QUERIES), heads, rows)](
        *(out, d_out, lse if d_lse is None else d_lse.contiguous(), delta),
        *(strides(out), strides(d_out), queries, heads),
        V=width,
        HAS_LSE=d_lse is not None,
        BLOCK_M=DELTA_QUERIES,
        BLOCK_V=padded(width),
    )
    return delta


def _launch_keys(inputs: Inputs, gradients: OutputGradients, dk: Tensor, dv: Tensor) -> None:
    q, k, v, _, intervals, scale, softcap = inputs
    rows, keys, kv_heads, _ = k.shape
    first, _, query_start, _ = intervals
    tile = tile_for(KEYS_CAPPED if softcap else KEYS, q, v)
    keys_kernel[(triton.cdiv(keys, tile.n), kv_heads, rows)](
        *(q, k, v, *gradients, *intervals, dk, dv),
        *(strides(t) for t in (q, k, v, gradients.d_out, dk, dv)),
        *(_row_stride(first), _row_stride(query_start), q.shape[1], keys, q.shape[2]),
        *(scale, softcap or 1.0),
        SHAPE=shape_of(q, k, v, softcap, tile),
        **compiler_options(tile),
    )


def _launch_queries(inputs: Inputs, gradients: OutputGradients, dq: Tensor) -> None:
    q, k, v, _, intervals, scale, softcap = inputs
    rows, queries, heads, _ = q.shape
    tile = tile_for(QUERIES, q, v)
    queries_kernel[(triton.cdiv(queries, tile.m), heads, rows)](
        *(q, k, v, *gradients, intervals.first, intervals.last, dq),
        *(strides(t) for t in (q, k, v, gradients.d_out, dq)),
        *(_row_stride(intervals.first), queries, k.shape[1], heads, scale, softcap or 1.0),
        SHAPE=shape_of(q, k, v, softcap, tile),
        **compiler_options(tile),
    )


def rows_of(t: Tensor) -> Tensor:
    """Return t itself where the elements of a head lie side by side, as in views, else a copy."""
    return t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()


def strides(t: Tensor) -> tuple[int, int, int]:
    """Return the strides of rows, tokens and heads of [B, S, H, D]."""
    return t.stride(0), t.stride(1), t.stride(2)


def _row_stride(index: Tensor) -> int:
    return 0 if index.shape[0] == 1 else index.stride(0)


def precision_of(q: Tensor) -> str:
    """Return the precision of fp32 products, by torch.set_float32_matmul_precision as in torch."""
    tf32 = q.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else "ieee"


def shape_of(q: Tensor, k: Tensor, v: Tensor, softcap: float, tile: Tile) -> Shape:
    """Return the compile-time constants of a launch."""
    width, value_width = q.shape[3], v.shape[3]
    return Shape(
        D=width,
        V=value_width,
        BLOCK_D=padded(width),
        BLOCK_V=padded(value_width),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        GROUP=q.shape[2] // k.shape[2],
        HAS_CAP=softcap > 0,
        PRECISION=precision_of(q),
    )


def compiler_options(tile: Tile) -> dict[str, int]:
    """Return what the compiler is told of a tile."""
    return {"num_warps": tile.warps, "num_stages": tile.stages}
