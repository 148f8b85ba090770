"""The forward pass: one program per tile of queries and head, over the blocks of keys that it sees.

Online softmax (arXiv 1805.02867, 2205.14135) in base 2: running maximum m, sum l and accumulator
are fp32, l is divided out once at the end. Blocks that every query of the tile sees whole take no
mask; those at either end of the intervals do. Shapes: B rows, M queries of a tile, N keys of a
block, D width of queries and keys, V width of values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_math import LOG2_E, tanh


@triton.jit
def load_block(
    base,
    start,
    stride,
    row_limit,
    MASK_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """[ROWS, BLOCK] from row `start` on, 0 outside.

    Masks are made only where something may be outside.

    Only the first row's offset has 64 bits: within a block 32 are enough, and take fewer registers.
    """
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    at = base + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    if MASK_ROWS and WIDTH != BLOCK:
        return tl.load(
            at, mask=(rows < row_limit - start)[:, None] & (columns < WIDTH)[None, :], other=0.0
        )
    if MASK_ROWS:
        return tl.load(at, mask=(rows < row_limit - start)[:, None], other=0.0)
    if WIDTH != BLOCK:
        return tl.load(at, mask=(columns < WIDTH)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def store_block(
    base,
    values,
    start,
    stride,
    row_limit,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As load_block; what lies outside is not written."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    place = base + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    tl.store(
        place,
        values.to(base.dtype.element_ty),
        mask=(rows < row_limit - start)[:, None] & (columns < WIDTH)[None, :],
    )


@triton.jit
def scores_of(a, b, scale, softcap, HAS_CAP: tl.constexpr, PRECISION: tl.constexpr):
    """A b^T in units of log2, capped: what exp2 takes."""
    s = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if HAS_CAP:
        return tanh(s * (scale / softcap)) * (softcap * LOG2_E)
    return s * (scale * LOG2_E)


@triton.jit
def whole_tiles(start, stop, common_start, common_stop, BLOCK: tl.constexpr):
    """Borders of the tiles within [start, stop) that lie within [common_start, common_stop): those that need no mask."""
    whole_start = tl.maximum(tl.cdiv(common_start, BLOCK) * BLOCK, start)
    whole_start = tl.minimum(whole_start, tl.maximum(tl.cdiv(stop, BLOCK) * BLOCK, start))
    return whole_start, tl.maximum(common_stop // BLOCK * BLOCK, whole_start)


@triton.jit
def count_tiles(start, stop, resume, end, BLOCK: tl.constexpr):
    """(tiles of [start, stop), the same and those of [resume, end)): both ends of an interval in one loop, whose code and registers are needed once then."""
    near = tl.cdiv(stop - start, BLOCK)
    return near, near + tl.cdiv(tl.maximum(end - resume, 0), BLOCK)


@triton.jit
def tile_start(t, near, start, resume, BLOCK: tl.constexpr):
    return tl.where(t < near, start + t * BLOCK, resume + (t - near) * BLOCK)


@triton.jit
def _over_keys(
    acc,
    m,
    l,
    q,
    k,
    v,
    first,
    last,
    start,
    stop,
    resume,
    end,
    keys,
    k_stride,
    v_stride,
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
        block = load_block(k, n, k_stride, keys, MASKED, D, BLOCK_N, BLOCK_D)
        s = scores_of(q, block, scale, softcap, HAS_CAP, PRECISION)
        if MASKED:
            at = n + tl.arange(0, BLOCK_N)
            s = tl.where(
                (at[None, :] >= first[:, None]) & (at[None, :] <= last[:, None]), s, float("-inf")
            )
        new = tl.maximum(m, tl.max(s, 1))
        # Nothing seen yet: inf - inf is nan
        safe = tl.where(new == float("-inf"), 0.0, new) if MASKED else new
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(m - safe)
        l = l * shrink + tl.sum(p, 1)
        values = load_block(v, n, v_stride, keys, MASKED, V, BLOCK_N, BLOCK_V)
        acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
        m = new
    return acc, m, l


@triton.jit
def key_ranges(first, last, tile, queries, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(start, whole_start, whole_stop, stop) of the keys that a tile of queries sees.

    All but stop at block borders.
    """
    top = tile * BLOCK_M
    bottom = tl.minimum(top + BLOCK_M, queries) - 1
    start = tl.load(first + top) // BLOCK_N * BLOCK_N
    stop = tl.load(last + bottom) + 1
    whole_start, whole_stop = whole_tiles(
        start, stop, tl.load(first + bottom), tl.load(last + top) + 1, BLOCK_N
    )
    return start, whole_start, whole_stop, stop


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    first,
    last,
    sinks,
    q_b,
    q_s,
    q_h,
    k_b,
    k_s,
    k_h,
    v_b,
    v_s,
    v_h,
    o_b,
    o_s,
    o_h,
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
    HAS_SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first: later queries see more
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    first += row * interval_stride
    last += row * interval_stride
    q += row * q_b + head.to(tl.int64) * q_h
    k += row * k_b + (head // GROUP).to(tl.int64) * k_h
    v += row * v_b + (head // GROUP).to(tl.int64) * v_h
    at = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    there = at < queries
    first_M = tl.load(first + at, mask=there, other=0)
    last_M = tl.load(last + at, mask=there, other=-1)
    tile_q = load_block(q, tile * BLOCK_M, q_s, queries, True, D, BLOCK_M, BLOCK_D)
    start, whole_start, whole_stop, stop = key_ranges(first, last, tile, queries, BLOCK_M, BLOCK_N)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    acc, m, l = _over_keys(
        acc,
        m,
        l,
        tile_q,
        k,
        v,
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
    acc, m, l = _over_keys(
        acc,
        m,
        l,
        tile_q,
        k,
        v,
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
    if HAS_SINKS:  # one more logit without a value
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        new = tl.maximum(m, sink)
        shrink = tl.exp2(m - new)
        l = l * shrink + tl.exp2(sink - new)
        acc = acc * shrink[:, None]
        m = new
    seen = l > 0.0
    acc = acc / tl.where(seen, l, 1.0)[:, None]
    natural = tl.where(seen, (m + tl.log2(tl.where(seen, l, 1.0))) / LOG2_E, float("-inf"))
    tl.store(lse + (row * heads + head) * queries + at, natural, mask=there)
    store_block(
        out + row * o_b + head.to(tl.int64) * o_h,
        acc,
        tile * BLOCK_M,
        o_s,
        queries,
        V,
        BLOCK_M,
        BLOCK_V,
    )
