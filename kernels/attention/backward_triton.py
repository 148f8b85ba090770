"""The backward pass, deterministic: gradients of keys and values by one kernel, of queries by another, no atomics.

    delta = sum_v out dout - dlse       p = exp(s - lse)       ds = p (dout v^T - delta)
    (arXiv 2205.14135)

The gradient through the log-sum-exp is only a part of delta. A program of the first kernel holds a
block of keys and goes over the queries that see it, of all query heads that share them; its scores
are transposed, so that statistics of queries lie along columns. Seven matrix products where a pass
with atomics has five; always the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.attention.forward_triton import (
    count_tiles,
    key_ranges,
    load_block,
    scores_of,
    store_block,
    tile_start,
)
from kernels.triton_math import LOG2_E


@triton.jit
def delta_kernel(
    out,
    d_out,
    d_lse,
    delta,
    o_b,
    o_s,
    o_h,
    do_b,
    do_s,
    do_h,
    queries,
    heads,
    V: tl.constexpr,
    HAS_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * BLOCK_M
    at = start + tl.arange(0, BLOCK_M)
    a = load_block(
        out + row * o_b + head.to(tl.int64) * o_h, start, o_s, queries, True, V, BLOCK_M, BLOCK_V
    ).to(tl.float32)
    b = load_block(
        d_out + row * do_b + head.to(tl.int64) * do_h,
        start,
        do_s,
        queries,
        True,
        V,
        BLOCK_M,
        BLOCK_V,
    ).to(tl.float32)
    found = tl.sum(a * b, 1)
    place = (row * heads + head) * queries + at
    if HAS_LSE:
        found -= tl.load(d_lse + place, mask=at < queries, other=0.0)
    tl.store(delta + place, found, mask=at < queries)


@triton.jit
def _through_cap(ds, s, softcap, HAS_CAP: tl.constexpr):
    """Gradient of the scores before the cap; s: capped scores in units of log2."""
    if HAS_CAP:
        t = s / (softcap * LOG2_E)
        ds = ds * (1.0 - t) * (1.0 + t)
    return ds


@triton.jit
def _load_statistics(lse, delta, at, queries):
    """(lse in units of log2, delta); a query that sees nothing has p = 0."""
    there = at < queries
    natural = tl.load(lse + at, mask=there, other=float("inf"))
    return tl.where(natural == float("-inf"), float("inf"), natural) * LOG2_E, tl.load(
        delta + at, mask=there, other=0.0
    )


@triton.jit
def _over_queries(
    dk,
    dv,
    k,
    v,
    q,
    d_out,
    lse,
    delta,
    first,
    last,
    at_N,
    start,
    stop,
    queries,
    q_s,
    do_s,
    scale,
    softcap,
    D: tl.constexpr,
    V: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # One loop with a mask: a second one without spilled 8 to 224 bytes
    for m in range(start, stop, BLOCK_M):
        at = m + tl.arange(0, BLOCK_M)
        tile_q = load_block(q, m, q_s, queries, True, D, BLOCK_M, BLOCK_D)
        tile_do = load_block(d_out, m, do_s, queries, True, V, BLOCK_M, BLOCK_V)
        lse2, delta_M = _load_statistics(lse, delta, at, queries)
        from_M = tl.load(first + at, mask=at < queries, other=0)
        to_M = tl.load(last + at, mask=at < queries, other=-1)
        s = scores_of(k, tile_q, scale, softcap, HAS_CAP, PRECISION)
        seen = (at_N[:, None] >= from_M[None, :]) & (at_N[:, None] <= to_M[None, :])
        p = tl.where(seen, tl.exp2(s - lse2[None, :]), 0.0)
        dv = tl.dot(p.to(tile_do.dtype), tile_do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(tile_do), input_precision=PRECISION)
        ds = _through_cap(p * (dp - delta_M[None, :]), s, softcap, HAS_CAP)
        dk = tl.dot(ds.to(tile_q.dtype), tile_q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def keys_kernel(
    q,
    k,
    v,
    d_out,
    lse,
    delta,
    first,
    last,
    query_start,
    query_stop,
    dk,
    dv,
    q_b,
    q_s,
    q_h,
    k_b,
    k_s,
    k_h,
    v_b,
    v_s,
    v_h,
    do_b,
    do_s,
    do_h,
    dk_b,
    dk_s,
    dk_h,
    dv_b,
    dv_s,
    dv_h,
    interval_stride,
    key_interval_stride,
    queries,
    keys,
    heads,
    scale,
    softcap,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    block, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first += row * interval_stride
    last += row * interval_stride
    query_start += row * key_interval_stride
    query_stop += row * key_interval_stride
    at = block * BLOCK_N + tl.arange(0, BLOCK_N)
    low, high = block * BLOCK_N, tl.minimum(block * BLOCK_N + BLOCK_N, keys) - 1
    k_N = load_block(
        k + row * k_b + kv_head.to(tl.int64) * k_h, low, k_s, keys, True, D, BLOCK_N, BLOCK_D
    )
    v_N = load_block(
        v + row * v_b + kv_head.to(tl.int64) * v_h, low, v_s, keys, True, V, BLOCK_N, BLOCK_V
    )
    start = tl.load(query_start + low) // BLOCK_M * BLOCK_M
    stop = tl.load(query_stop + high)
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_h_at = q + row * q_b + head.to(tl.int64) * q_h
        do_at = d_out + row * do_b + head.to(tl.int64) * do_h
        lse_at = lse + (row * heads + head) * queries
        delta_at = delta + (row * heads + head) * queries
        acc_k, acc_v = _over_queries(
            acc_k,
            acc_v,
            k_N,
            v_N,
            q_h_at,
            do_at,
            lse_at,
            delta_at,
            first,
            last,
            at,
            start,
            stop,
            queries,
            q_s,
            do_s,
            scale,
            softcap,
            D,
            V,
            HAS_CAP,
            PRECISION,
            BLOCK_M,
            BLOCK_D,
            BLOCK_V,
        )
    store_block(
        dk + row * dk_b + kv_head.to(tl.int64) * dk_h,
        acc_k * scale,
        low,
        dk_s,
        keys,
        D,
        BLOCK_N,
        BLOCK_D,
    )
    store_block(
        dv + row * dv_b + kv_head.to(tl.int64) * dv_h, acc_v, low, dv_s, keys, V, BLOCK_N, BLOCK_V
    )


@triton.jit
def _dq_over_keys(
    dq,
    q,
    k,
    v,
    d_out,
    lse2,
    delta,
    first,
    last,
    start,
    stop,
    resume,
    end,
    keys,
    k_s,
    v_s,
    scale,
    softcap,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    near, count = count_tiles(start, stop, resume, end, BLOCK_N)
    for t in range(count):
        n = tile_start(t, near, start, resume, BLOCK_N)
        k_N = load_block(k, n, k_s, keys, MASKED, D, BLOCK_N, BLOCK_D)
        v_N = load_block(v, n, v_s, keys, MASKED, V, BLOCK_N, BLOCK_V)
        s = scores_of(q, k_N, scale, softcap, HAS_CAP, PRECISION)
        p = tl.exp2(s - lse2[:, None])
        if MASKED:
            at = n + tl.arange(0, BLOCK_N)
            p = tl.where((at[None, :] >= first[:, None]) & (at[None, :] <= last[:, None]), p, 0.0)
        dp = tl.dot(d_out, tl.trans(v_N), input_precision=PRECISION)
        ds = _through_cap(p * (dp - delta[:, None]), s, softcap, HAS_CAP)
        dq = tl.dot(ds.to(k_N.dtype), k_N, dq, input_precision=PRECISION)
    return dq


@triton.jit
def queries_kernel(
    q,
    k,
    v,
    d_out,
    lse,
    delta,
    first,
    last,
    dq,
    q_b,
    q_s,
    q_h,
    k_b,
    k_s,
    k_h,
    v_b,
    v_s,
    v_h,
    do_b,
    do_s,
    do_h,
    dq_b,
    dq_s,
    dq_h,
    interval_stride,
    queries,
    keys,
    heads,
    scale,
    softcap,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    first += row * interval_stride
    last += row * interval_stride
    k += row * k_b + (head // GROUP).to(tl.int64) * k_h
    v += row * v_b + (head // GROUP).to(tl.int64) * v_h
    at = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    there = at < queries
    first_M = tl.load(first + at, mask=there, other=0)
    last_M = tl.load(last + at, mask=there, other=-1)
    q_M = load_block(
        q + row * q_b + head.to(tl.int64) * q_h,
        tile * BLOCK_M,
        q_s,
        queries,
        True,
        D,
        BLOCK_M,
        BLOCK_D,
    )
    do_M = load_block(
        d_out + row * do_b + head.to(tl.int64) * do_h,
        tile * BLOCK_M,
        do_s,
        queries,
        True,
        V,
        BLOCK_M,
        BLOCK_V,
    )
    lse2, delta_M = _load_statistics(
        lse + (row * heads + head) * queries, delta + (row * heads + head) * queries, at, queries
    )
    start, whole_start, whole_stop, stop = key_ranges(first, last, tile, queries, BLOCK_M, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    acc = _dq_over_keys(
        acc,
        q_M,
        k,
        v,
        do_M,
        lse2,
        delta_M,
        first_M,
        last_M,
        start,
        whole_start,
        whole_stop,
        stop,
        keys,
        k_s,
        v_s,
        scale,
        softcap,
        True,
        D,
        V,
        HAS_CAP,
        PRECISION,
        BLOCK_N,
        BLOCK_D,
        BLOCK_V,
    )
    acc = _dq_over_keys(
        acc,
        q_M,
        k,
        v,
        do_M,
        lse2,
        delta_M,
        first_M,
        last_M,
        whole_start,
        whole_stop,
        stop,
        stop,
        keys,
        k_s,
        v_s,
        scale,
        softcap,
        False,
        D,
        V,
        HAS_CAP,
        PRECISION,
        BLOCK_N,
        BLOCK_D,
        BLOCK_V,
    )
    store_block(
        dq + row * dq_b + head.to(tl.int64) * dq_h,
        acc * scale,
        tile * BLOCK_M,
        dq_s,
        queries,
        D,
        BLOCK_M,
        BLOCK_D,
    )
