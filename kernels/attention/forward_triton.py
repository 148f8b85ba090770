"""Forward pass of attention: one program per tile of queries and head, over the keys that it sees.

Online softmax (arXiv 1805.02867, 2205.14135) in base 2: running maximum m, sum `total` and
accumulator are fp32, the sum is divided out once at the end. Blocks that every query of the tile
sees whole take no mask; those at either end of the intervals do. Shapes: B rows, M queries of a
tile, N keys of a block, D width of queries and keys, V width of values.
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
def _over_keys(
    acc: tj.Block,
    m: tj.Block,
    total: tj.Block,
    q: tj.Block,
    k: HeadRows,
    v: HeadRows,
    first: tj.Block,
    last: tj.Block,
    spans: tj.Scalar,
    scale: tj.Scalar,
    softcap: tj.Scalar,
    MASKED: tl.constexpr,
    SHAPE: tl.constexpr,
) -> tuple[tj.Block, tj.Block, tj.Block]:
    """Add the keys of two spans (start, stop, resume, end) to the running (acc, m, total)."""
    near, count = count_blocks(spans, SHAPE.BLOCK_N)
    unit = score_unit(scale, SHAPE.HAS_CAP)
    for t in range(count):
        n = block_start(t, near, spans, SHAPE.BLOCK_N)
        keys = load_block(k, n, MASKED, SHAPE.D, SHAPE.BLOCK_N, SHAPE.BLOCK_D)
        s = scores(q, keys, scale, softcap, SHAPE.HAS_CAP, SHAPE.PRECISION)
        if MASKED:
            at = n + tl.arange(0, SHAPE.BLOCK_N)
            seen = (at[None, :] >= first[:, None]) & (at[None, :] <= last[:, None])
            s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(m, tl.max(s, 1) * unit)
        # Nothing seen yet: inf - inf is nan
        safe = tl.where(new == float("-inf"), 0.0, new) if MASKED else new
        p = tl.exp2(less_peak(s, unit, safe[:, None]))
        shrink = tl.exp2(m - safe)
        total = total * shrink + tl.sum(p, 1)
        values = load_block(v, n, MASKED, SHAPE.V, SHAPE.BLOCK_N, SHAPE.BLOCK_V)
        acc = tl.dot(
            p.to(values.dtype), values, acc * shrink[:, None], input_precision=SHAPE.PRECISION
        )
        m = new
    return acc, m, total


@jit
def _add_sink(
    acc: tj.Block, m: tj.Block, total: tj.Block, sink: tj.Pointer
) -> tuple[tj.Block, tj.Block, tj.Block]:
    """Add one more logit, without a value, to the running (acc, m, total)."""
    logit = tl.load(sink).to(tl.float32) * LOG2_E
    new = tl.maximum(m, logit)
    # Nothing seen, and a sink of -inf: inf - inf is nan
    safe = tl.where(new == float("-inf"), 0.0, new)
    shrink = tl.exp2(m - safe)
    return acc * shrink[:, None], new, total * shrink + tl.exp2(logit - safe)


@jit
def forward_kernel(
    q: tj.Pointer,
    k: tj.Pointer,
    v: tj.Pointer,
    out: tj.Pointer,
    lse: tj.Pointer,
    peak: tj.Pointer,
    log_sum: tj.Pointer,
    first: tj.Pointer,
    last: tj.Pointer,
    sinks: tj.Pointer,
    q_strides: tj.Strides,
    k_strides: tj.Strides,
    v_strides: tj.Strides,
    out_strides: tj.Strides,
    interval_stride: tj.Scalar,
    queries: tj.Scalar,
    keys: tj.Scalar,
    heads: tj.Scalar,
    scale: tj.Scalar,
    softcap: tj.Scalar,
    HAS_SINKS: tl.constexpr,
    SHAPE: tl.constexpr,
) -> None:
    """Write out, the natural log-sum-exp and its two parts of one tile of queries of one head."""
    tiles = tl.cdiv(queries, SHAPE.BLOCK_M)
    place, head, row = program_place(tiles, heads)
    tile = tiles - 1 - place  # the longest first: later queries see more
    first += row * interval_stride
    last += row * interval_stride
    k_rows = rows_of_head(k, k_strides, row, head // SHAPE.GROUP, keys)
    v_rows = rows_of_head(v, v_strides, row, head // SHAPE.GROUP, keys)
    at = tile * SHAPE.BLOCK_M + tl.arange(0, SHAPE.BLOCK_M)
    first_M, last_M = load_ends(first, last, at, queries)
    q_rows = rows_of_head(q, q_strides, row, head, queries)
    tile_q = load_block(q_rows, tile * SHAPE.BLOCK_M, True, SHAPE.D, SHAPE.BLOCK_M, SHAPE.BLOCK_D)
    start, whole_start, whole_stop, stop = key_ranges(
        first, last, tile, queries, SHAPE.BLOCK_M, SHAPE.BLOCK_N
    )
    m = tl.full((SHAPE.BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((SHAPE.BLOCK_M,), tl.float32)
    acc = tl.zeros((SHAPE.BLOCK_M, SHAPE.BLOCK_V), tl.float32)
    ends = (start, whole_start, whole_stop, stop)
    acc, m, total = _over_keys(
        acc, m, total, tile_q, k_rows, v_rows, first_M, last_M, ends, scale, softcap, True, SHAPE
    )
    middle = (whole_start, whole_stop, stop, stop)
    acc, m, total = _over_keys(
        acc, m, total, tile_q, k_rows, v_rows, first_M, last_M, middle, scale, softcap, False, SHAPE
    )
    if HAS_SINKS:
        acc, m, total = _add_sink(acc, m, total, sinks + head)
    seen = total > 0.0
    total = tl.where(seen, total, 1.0)
    acc = acc / total[:, None]
    log_total = tl.log2(total)
    statistics = (row * heads + head) * queries + at
    tl.store(lse + statistics, (m + log_total) / LOG2_E, mask=at < queries)
    tl.store(peak + statistics, m, mask=at < queries)
    tl.store(log_sum + statistics, log_total, mask=at < queries)
    out_rows = rows_of_head(out, out_strides, row, head, queries)
    store_block(out_rows, acc, tile * SHAPE.BLOCK_M, SHAPE.V, SHAPE.BLOCK_M, SHAPE.BLOCK_V)
