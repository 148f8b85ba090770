"""Backward pass of attention, deterministic: one kernel for keys and values, one for queries.

    delta = sum_v out dout - dlse       p = exp(s - lse)       ds = p (dout v^T - delta)
    (arXiv 2205.14135)

The log-sum-exp is read in its two parts, the largest score and the logarithm of the sum that is
relative to it: their sum would lose the digits of the latter where scores are large. There are no
atomics. The gradient through the log-sum-exp is only a part of delta. A program of the
kernel for keys holds a block of keys and goes over the queries that see it, of all query heads that
share them, or of a part of those where key heads are too few to occupy the device: the sums of
parts are added afterwards. Its scores are transposed, so that statistics of queries lie along
columns. Seven matrix products where a pass with atomics has five; always the same bits.
"""

from __future__ import annotations

import triton.language as tl

from kernels import triton_jit as tj
from kernels.attention.tiles_triton import (
    HeadRows,
    block_start,
    count_blocks,
    key_ranges,
    less_peak,
    load_block,
    load_ends,
    program_place,
    rows_of_head,
    score_unit,
    scores,
    store_block,
)
from kernels.triton_jit import jit
from kernels.triton_math import LOG2_E


@jit
def delta_kernel(
    out: tj.Pointer,
    d_out: tj.Pointer,
    d_lse: tj.Pointer,
    delta: tj.Pointer,
    out_strides: tj.Strides,
    d_out_strides: tj.Strides,
    queries: tj.Scalar,
    heads: tj.Scalar,
    V: tl.constexpr,
    HAS_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
) -> None:
    """Write delta of one tile of queries of one head."""
    tile, head, row = program_place(tl.cdiv(queries, BLOCK_M), heads)
    start = tile * BLOCK_M
    at = start + tl.arange(0, BLOCK_M)
    out_rows = rows_of_head(out, out_strides, row, head, queries)
    d_out_rows = rows_of_head(d_out, d_out_strides, row, head, queries)
    a = load_block(out_rows, start, True, V, BLOCK_M, BLOCK_V).to(tl.float32)
    b = load_block(d_out_rows, start, True, V, BLOCK_M, BLOCK_V).to(tl.float32)
    sums = tl.sum(a * b, 1)
    offsets = (row * heads + head) * queries + at
    if HAS_LSE:
        sums -= tl.load(d_lse + offsets, mask=at < queries, other=0.0)
    tl.store(delta + offsets, sums, mask=at < queries)


@jit
def _through_cap(ds: tj.Block, s: tj.Block, softcap: tj.Scalar, HAS_CAP: tl.constexpr) -> tj.Block:
    """Gradient of the scores before the cap; s: capped scores in units of log2."""
    if HAS_CAP:
        t = s / (softcap * LOG2_E)
        ds = ds * (1.0 - t) * (1.0 + t)
    return ds


@jit
def _load_statistic(
    values: tj.Pointer, at: tj.Block, queries: tj.Scalar, other: tl.constexpr
) -> tj.Block:
    """One number per query, `other` outside of the queries."""
    return tl.load(values + at, mask=at < queries, other=other)


@jit
def _over_queries(
    dk: tj.Block,
    dv: tj.Block,
    k: tj.Block,
    v: tj.Block,
    q: HeadRows,
    d_out: HeadRows,
    peak: tj.Pointer,
    log_sum: tj.Pointer,
    delta: tj.Pointer,
    first: tj.Pointer,
    last: tj.Pointer,
    at_N: tj.Block,
    start: tj.Scalar,
    stop: tj.Scalar,
    scale: tj.Scalar,
    softcap: tj.Scalar,
    SHAPE: tl.constexpr,
) -> tuple[tj.Block, tj.Block]:
    """Add the queries start..stop of one head to the gradients of a block of keys and values."""
    unit = score_unit(scale, SHAPE.HAS_CAP)
    # One loop with a mask: a second one without spilled 8 to 224 bytes
    for m in range(start, stop, SHAPE.BLOCK_M):
        at = m + tl.arange(0, SHAPE.BLOCK_M)
        tile_q = load_block(q, m, True, SHAPE.D, SHAPE.BLOCK_M, SHAPE.BLOCK_D)
        tile_do = load_block(d_out, m, True, SHAPE.V, SHAPE.BLOCK_M, SHAPE.BLOCK_V)
        # Each statistic is loaded where it is used: together they spill 56 bytes at D=128
        peak_M = _load_statistic(peak, at, q.count, float("inf"))
        first_M, last_M = load_ends(first, last, at, q.count)
        s = scores(k, tile_q, scale, softcap, SHAPE.HAS_CAP, SHAPE.PRECISION)
        seen = (at_N[:, None] >= first_M[None, :]) & (at_N[:, None] <= last_M[None, :])
        log_sum_M = _load_statistic(log_sum, at, q.count, 0.0)
        p = tl.where(seen, tl.exp2(less_peak(s, unit, peak_M[None, :]) - log_sum_M[None, :]), 0.0)
        dv = tl.dot(p.to(tile_do.dtype), tile_do, dv, input_precision=SHAPE.PRECISION)
        dp = tl.dot(v, tl.trans(tile_do), input_precision=SHAPE.PRECISION)
        delta_M = _load_statistic(delta, at, q.count, 0.0)
        ds = _through_cap(p * (dp - delta_M[None, :]), s, softcap, SHAPE.HAS_CAP)
        dk = tl.dot(ds.to(tile_q.dtype), tile_q, dk, input_precision=SHAPE.PRECISION)
    return dk, dv


@jit
def keys_kernel(
    q: tj.Pointer,
    k: tj.Pointer,
    v: tj.Pointer,
    d_out: tj.Pointer,
    peak: tj.Pointer,
    log_sum: tj.Pointer,
    delta: tj.Pointer,
    first: tj.Pointer,
    last: tj.Pointer,
    query_start: tj.Pointer,
    query_stop: tj.Pointer,
    dk: tj.Pointer,
    dv: tj.Pointer,
    q_strides: tj.Strides,
    k_strides: tj.Strides,
    v_strides: tj.Strides,
    d_out_strides: tj.Strides,
    dk_strides: tj.Strides,
    dv_strides: tj.Strides,
    interval_stride: tj.Scalar,
    key_interval_stride: tj.Scalar,
    queries: tj.Scalar,
    keys: tj.Scalar,
    heads: tj.Scalar,
    scale: tj.Scalar,
    softcap: tj.Scalar,
    SHAPE: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """Write the gradients of a block of keys and values from a part of a group of query heads.

    dk and dv have PARTS heads for each key head.
    """
    MEMBERS: tl.constexpr = SHAPE.GROUP // PARTS
    blocks = tl.cdiv(keys, SHAPE.BLOCK_N)
    block, part, row = program_place(blocks, heads // MEMBERS)
    kv_head = part // PARTS
    first += row * interval_stride
    last += row * interval_stride
    query_start += row * key_interval_stride
    query_stop += row * key_interval_stride
    at = block * SHAPE.BLOCK_N + tl.arange(0, SHAPE.BLOCK_N)
    low, high = block * SHAPE.BLOCK_N, tl.minimum(block * SHAPE.BLOCK_N + SHAPE.BLOCK_N, keys) - 1
    k_rows = rows_of_head(k, k_strides, row, kv_head, keys)
    v_rows = rows_of_head(v, v_strides, row, kv_head, keys)
    k_N = load_block(k_rows, low, True, SHAPE.D, SHAPE.BLOCK_N, SHAPE.BLOCK_D)
    v_N = load_block(v_rows, low, True, SHAPE.V, SHAPE.BLOCK_N, SHAPE.BLOCK_V)
    start = tl.load(query_start + low) // SHAPE.BLOCK_M * SHAPE.BLOCK_M
    stop = tl.load(query_stop + high)
    acc_k = tl.zeros((SHAPE.BLOCK_N, SHAPE.BLOCK_D), tl.float32)
    acc_v = tl.zeros((SHAPE.BLOCK_N, SHAPE.BLOCK_V), tl.float32)
    for member in range(MEMBERS):
        head = part * MEMBERS + member
        q_rows = rows_of_head(q, q_strides, row, head, queries)
        d_out_rows = rows_of_head(d_out, d_out_strides, row, head, queries)
        statistics = (row * heads + head) * queries
        acc_k, acc_v = _over_queries(
            acc_k, acc_v, k_N, v_N, q_rows, d_out_rows,
            peak + statistics, log_sum + statistics, delta + statistics,
            first, last, at, start, stop, scale, softcap, SHAPE,
        )  # fmt: skip
    dk_rows = rows_of_head(dk, dk_strides, row, part, keys)
    dv_rows = rows_of_head(dv, dv_strides, row, part, keys)
    store_block(dk_rows, acc_k * scale, low, SHAPE.D, SHAPE.BLOCK_N, SHAPE.BLOCK_D)
    store_block(dv_rows, acc_v, low, SHAPE.V, SHAPE.BLOCK_N, SHAPE.BLOCK_V)


@jit
def _over_keys(
    dq: tj.Block,
    q: tj.Block,
    k: HeadRows,
    v: HeadRows,
    d_out: tj.Block,
    peak: tj.Block,
    log_sum: tj.Block,
    delta: tj.Block,
    first: tj.Block,
    last: tj.Block,
    spans: tj.Scalar,
    scale: tj.Scalar,
    softcap: tj.Scalar,
    MASKED: tl.constexpr,
    SHAPE: tl.constexpr,
) -> tj.Block:
    """Add the keys of two spans (start, stop, resume, end) to the gradient of a tile of queries."""
    near, count = count_blocks(spans, SHAPE.BLOCK_N)
    unit = score_unit(scale, SHAPE.HAS_CAP)
    for t in range(count):
        n = block_start(t, near, spans, SHAPE.BLOCK_N)
        k_N = load_block(k, n, MASKED, SHAPE.D, SHAPE.BLOCK_N, SHAPE.BLOCK_D)
        v_N = load_block(v, n, MASKED, SHAPE.V, SHAPE.BLOCK_N, SHAPE.BLOCK_V)
        s = scores(q, k_N, scale, softcap, SHAPE.HAS_CAP, SHAPE.PRECISION)
        p = tl.exp2(less_peak(s, unit, peak[:, None]) - log_sum[:, None])
        if MASKED:
            at = n + tl.arange(0, SHAPE.BLOCK_N)
            p = tl.where((at[None, :] >= first[:, None]) & (at[None, :] <= last[:, None]), p, 0.0)
        dp = tl.dot(d_out, tl.trans(v_N), input_precision=SHAPE.PRECISION)
        ds = _through_cap(p * (dp - delta[:, None]), s, softcap, SHAPE.HAS_CAP)
        dq = tl.dot(ds.to(k_N.dtype), k_N, dq, input_precision=SHAPE.PRECISION)
    return dq


@jit
def queries_kernel(
    q: tj.Pointer,
    k: tj.Pointer,
    v: tj.Pointer,
    d_out: tj.Pointer,
    peak: tj.Pointer,
    log_sum: tj.Pointer,
    delta: tj.Pointer,
    first: tj.Pointer,
    last: tj.Pointer,
    dq: tj.Pointer,
    q_strides: tj.Strides,
    k_strides: tj.Strides,
    v_strides: tj.Strides,
    d_out_strides: tj.Strides,
    dq_strides: tj.Strides,
    interval_stride: tj.Scalar,
    queries: tj.Scalar,
    keys: tj.Scalar,
    heads: tj.Scalar,
    scale: tj.Scalar,
    softcap: tj.Scalar,
    SHAPE: tl.constexpr,
) -> None:
    """Write the gradient of one tile of queries of one head."""
    tiles = tl.cdiv(queries, SHAPE.BLOCK_M)
    place, head, row = program_place(tiles, heads)
    tile = tiles - 1 - place
    first += row * interval_stride
    last += row * interval_stride
    k_rows = rows_of_head(k, k_strides, row, head // SHAPE.GROUP, keys)
    v_rows = rows_of_head(v, v_strides, row, head // SHAPE.GROUP, keys)
    at = tile * SHAPE.BLOCK_M + tl.arange(0, SHAPE.BLOCK_M)
    first_M, last_M = load_ends(first, last, at, queries)
    q_rows = rows_of_head(q, q_strides, row, head, queries)
    d_out_rows = rows_of_head(d_out, d_out_strides, row, head, queries)
    q_M = load_block(q_rows, tile * SHAPE.BLOCK_M, True, SHAPE.D, SHAPE.BLOCK_M, SHAPE.BLOCK_D)
    do_M = load_block(d_out_rows, tile * SHAPE.BLOCK_M, True, SHAPE.V, SHAPE.BLOCK_M, SHAPE.BLOCK_V)
    statistics = (row * heads + head) * queries
    peak_M = _load_statistic(peak + statistics, at, queries, float("inf"))
    log_sum_M = _load_statistic(log_sum + statistics, at, queries, 0.0)
    delta_M = _load_statistic(delta + statistics, at, queries, 0.0)
    start, whole_start, whole_stop, stop = key_ranges(
        first, last, tile, queries, SHAPE.BLOCK_M, SHAPE.BLOCK_N
    )
    acc = tl.zeros((SHAPE.BLOCK_M, SHAPE.BLOCK_D), tl.float32)
    acc = _over_keys(
        acc, q_M, k_rows, v_rows, do_M, peak_M, log_sum_M, delta_M, first_M, last_M,
        (start, whole_start, whole_stop, stop), scale, softcap, True, SHAPE,
    )  # fmt: skip
    acc = _over_keys(
        acc, q_M, k_rows, v_rows, do_M, peak_M, log_sum_M, delta_M, first_M, last_M,
        (whole_start, whole_stop, stop, stop), scale, softcap, False, SHAPE,
    )  # fmt: skip
    dq_rows = rows_of_head(dq, dq_strides, row, head, queries)
    store_block(dq_rows, acc * scale, tile * SHAPE.BLOCK_M, SHAPE.D, SHAPE.BLOCK_M, SHAPE.BLOCK_D)
