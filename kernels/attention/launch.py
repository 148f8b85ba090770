"""Tiles for the Triton kernels, and their launches."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kernels.attention.backward_triton import delta_kernel, keys_kernel, queries_kernel
from kernels.attention.forward_triton import forward_kernel
from kernels.attention.intervals import Intervals


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


def padded(width: int) -> int:
    """Width of tiles: a power of two, at least what tl.dot takes."""
    return max(16, triton.next_power_of_2(width))


def tile_for(table: dict[int, Tile], q: Tensor, v: Tensor) -> Tile:
    if q.element_size() > 2:
        return WIDE
    width = max(q.shape[3], v.shape[3])
    return next(tile for limit, tile in sorted(table.items()) if width <= limit)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    intervals: Intervals,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    q, k, v = (rows_of(t) for t in (q, k, v))
    rows, queries, heads, width = q.shape
    out = q.new_empty(rows, queries, heads, v.shape[3])
    lse = q.new_empty(rows, heads, queries, dtype=torch.float32)
    if not lse.numel():
        return out, lse
    tile = tile_for(FORWARD, q, v)
    forward_kernel[(triton.cdiv(queries, tile.m), heads, rows)](
        q,
        k,
        v,
        out,
        lse,
        intervals.first,
        intervals.last,
        lse if sinks is None else sinks,
        *strides(q),
        *strides(k),
        *strides(v),
        *strides(out),
        _row_stride(intervals.first),
        queries,
        k.shape[1],
        heads,
        scale,
        softcap or 1.0,
        GROUP=heads // k.shape[2],
        **constants(q, v, softcap, tile),
        HAS_SINKS=sinks is not None,
    )
    return out, lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    intervals: Intervals,
    scale: float,
    softcap: float,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, d_out = (rows_of(t) for t in (q, k, v, d_out))
    rows, queries, heads, _ = q.shape
    keys, kv_heads = k.shape[1:3]
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    delta = torch.empty_like(lse)
    d_sinks = q.new_empty(0) if sinks is None else torch.zeros_like(sinks)
    if not lse.numel() or not keys:
        return dq.zero_(), dk.zero_(), dv.zero_(), d_sinks
    block_v = padded(v.shape[3])
    delta_kernel[(triton.cdiv(queries, 64), heads, rows)](
        out,
        d_out,
        lse if d_lse is None else d_lse.contiguous(),
        delta,
        *strides(out),
        *strides(d_out),
        queries,
        heads,
        V=v.shape[3],
        HAS_LSE=d_lse is not None,
        BLOCK_M=64,
        BLOCK_V=block_v,
    )
    first, last, start, stop = intervals
    common = (*strides(q), *strides(k), *strides(v), *strides(d_out))
    tile = tile_for(KEYS_CAPPED if softcap else KEYS, q, v)
    keys_kernel[(triton.cdiv(keys, tile.n), kv_heads, rows)](
        q,
        k,
        v,
        d_out,
        lse,
        delta,
        first,
        last,
        start,
        stop,
        dk,
        dv,
        *common,
        *strides(dk),
        *strides(dv),
        _row_stride(first),
        _row_stride(start),
        queries,
        keys,
        heads,
        scale,
        softcap or 1.0,
        GROUP=heads // kv_heads,
        **constants(q, v, softcap, tile),
    )
    tile = tile_for(QUERIES, q, v)
    queries_kernel[(triton.cdiv(queries, tile.m), heads, rows)](
        q,
        k,
        v,
        d_out,
        lse,
        delta,
        first,
        last,
        dq,
        *common,
        *strides(dq),
        _row_stride(first),
        queries,
        keys,
        heads,
        scale,
        softcap or 1.0,
        GROUP=heads // kv_heads,
        **constants(q, v, softcap, tile),
    )
    if sinks is not None:  # a sink is a key without value: ds = p (0 - delta)
        d_sinks = (
            -(torch.exp(sinks.float().view(1, -1, 1) - lse) * delta).sum((0, 2)).to(sinks.dtype)
        )
    return dq, dk, dv, d_sinks


def rows_of(t: Tensor) -> Tensor:
    """T itself where the elements of a head lie side by side, as they do in views of a projection.

    Else a copy.
    """
    return t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()


def strides(t: Tensor) -> tuple[int, int, int]:
    """Of rows, tokens and heads of [B, S, H, D]."""
    return t.stride(0), t.stride(1), t.stride(2)


def _row_stride(index: Tensor) -> int:
    return 0 if index.shape[0] == 1 else index.stride(0)


def precision_of(q: Tensor) -> str:
    """fp32 products are exact unless torch.set_float32_matmul_precision allows tf32, as for torch's own."""
    return (
        "tf32"
        if q.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
        else "ieee"
    )


def constants(q: Tensor, v: Tensor, softcap: float, tile: Tile) -> dict[str, object]:
    return {
        "D": q.shape[3],
        "V": v.shape[3],
        "HAS_CAP": softcap > 0,
        "PRECISION": precision_of(q),
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_D": padded(q.shape[3]),
        "BLOCK_V": padded(v.shape[3]),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
