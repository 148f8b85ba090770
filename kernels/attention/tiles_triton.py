"""Parts that the attention kernels share: loads and stores of tiles, scores, ranges of keys.

Shapes: M queries of a tile, N keys of a block, D width of queries and keys, V width of values.
"""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl

from kernels import triton_jit as tj
from kernels.triton_jit import jit
from kernels.triton_math import LOG2_E, tanh


class Shape(NamedTuple):
    """Compile-time constants of a kernel.

    Attributes:
        D: width of queries and keys.
        V: width of values.
        BLOCK_D: D rounded up to a power of two.
        BLOCK_V: V rounded up to a power of two.
        BLOCK_M: queries of a tile.
        BLOCK_N: keys of a block.
        GROUP: query heads per key head.
        HAS_CAP: whether scores have a soft cap.
        PRECISION: of fp32 products, "ieee" or "tf32".
    """

    D: int
    V: int
    BLOCK_D: int
    BLOCK_V: int
    BLOCK_M: int
    BLOCK_N: int
    GROUP: int
    HAS_CAP: bool
    PRECISION: str


class HeadRows(NamedTuple):
    """Vectors of one head in memory: the first element, the stride of tokens, their number."""

    base: tj.Pointer
    stride: tj.Scalar
    count: tj.Scalar


@jit
def program_place(tiles: tj.Scalar, heads: tj.Scalar) -> tuple[tj.Scalar, tj.Scalar, tj.Scalar]:
    """(tile, head, row) of a program, tiles first; `row` in 64 bits.

    One axis of the grid: the others end at 65,535.
    """
    number = tl.program_id(0)
    beside = number // tiles
    return number % tiles, beside % heads, (beside // heads).to(tl.int64)


@jit
def rows_of_head(
    base: tj.Pointer, strides: tj.Strides, row: tj.Scalar, head: tj.Scalar, count: tj.Scalar
) -> HeadRows:
    """Vectors of a head of a row; strides of rows, tokens and heads, `row` in 64 bits."""
    return HeadRows(base + row * strides[0] + head.to(tl.int64) * strides[2], strides[1], count)


@jit
def load_block(
    rows: HeadRows,
    start: tj.Scalar,
    MASK_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tj.Block:
    """Load [ROWS, BLOCK] from row `start` on, 0 outside.

    Masks are made only where something may be outside. Only the first row's offset has 64 bits:
    within a block 32 are enough, and take fewer registers.
    """
    at, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    offsets = at[:, None] * rows.stride + columns[None, :]
    pointers = rows.base + tl.cast(start, tl.int64) * rows.stride + offsets
    if MASK_ROWS and WIDTH != BLOCK:
        inside = (at < rows.count - start)[:, None] & (columns < WIDTH)[None, :]
        return tl.load(pointers, mask=inside, other=0.0)
    if MASK_ROWS:
        return tl.load(pointers, mask=(at < rows.count - start)[:, None], other=0.0)
    if WIDTH != BLOCK:
        return tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)
    return tl.load(pointers)


@jit
def store_block(
    rows: HeadRows,
    values: tj.Block,
    start: tj.Scalar,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Store [ROWS, BLOCK] from row `start` on; what lies outside is not written."""
    at, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    offsets = at[:, None] * rows.stride + columns[None, :]
    pointers = rows.base + tl.cast(start, tl.int64) * rows.stride + offsets
    inside = (at < rows.count - start)[:, None] & (columns < WIDTH)[None, :]
    tl.store(pointers, values.to(rows.base.dtype.element_ty), mask=inside)


@jit
def scores(
    a: tj.Block,
    b: tj.Block,
    scale: tj.Scalar,
    softcap: tj.Scalar,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tj.Block:
    """Compute a b^T, capped; its product with `score_unit` is in units of log2: what exp2 takes."""
    s = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if HAS_CAP:
        return tanh(s * (scale / softcap)) * (softcap * LOG2_E)
    return s


@jit
def score_unit(scale: tj.Scalar, HAS_CAP: tl.constexpr) -> tj.Scalar:
    """Factor of `scores`, folded into the exponents by a fused multiply-add, which rounds once."""
    return 1.0 if HAS_CAP else scale * LOG2_E


@jit
def less_peak(s: tj.Block, unit: tj.Scalar, peak: tj.Block) -> tj.Block:
    """Scores in units of log2, relative to the peak of their row or column."""
    return tl.fma(s, tl.zeros_like(s) + unit, tl.zeros_like(s) - peak)


@jit
def whole_tiles(
    start: tj.Scalar,
    stop: tj.Scalar,
    common_start: tj.Scalar,
    common_stop: tj.Scalar,
    BLOCK: tl.constexpr,
) -> tuple[tj.Scalar, tj.Scalar]:
    """Borders of the blocks of [start, stop) without mask: those in the common range."""
    whole_start = tl.maximum(tl.cdiv(common_start, BLOCK) * BLOCK, start)
    whole_start = tl.minimum(whole_start, tl.maximum(tl.cdiv(stop, BLOCK) * BLOCK, start))
    return whole_start, tl.maximum(common_stop // BLOCK * BLOCK, whole_start)


@jit
def count_blocks(spans: tj.Scalar, BLOCK: tl.constexpr) -> tuple[tj.Scalar, tj.Scalar]:
    """Blocks of the first of two spans (start, stop, resume, end), and of both.

    Both ends of an interval go through one loop, whose code and registers are needed once then.
    """
    near = tl.cdiv(spans[1] - spans[0], BLOCK)
    return near, near + tl.cdiv(tl.maximum(spans[3] - spans[2], 0), BLOCK)


@jit
def block_start(t: tj.Scalar, near: tj.Scalar, spans: tj.Scalar, BLOCK: tl.constexpr) -> tj.Scalar:
    """First key of the block number t of two spans, the first of which has `near` blocks."""
    return tl.where(t < near, spans[0] + t * BLOCK, spans[2] + (t - near) * BLOCK)


@jit
def load_ends(
    first: tj.Pointer, last: tj.Pointer, at: tj.Block, queries: tj.Scalar
) -> tuple[tj.Block, tj.Block]:
    """First and last key [M] that each query sees; none for those outside."""
    inside = at < queries
    first_M = tl.load(first + at, mask=inside, other=0)
    return first_M, tl.load(last + at, mask=inside, other=-1)


@jit
def key_ranges(
    first: tj.Pointer,
    last: tj.Pointer,
    tile: tj.Scalar,
    queries: tj.Scalar,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tuple[tj.Scalar, tj.Scalar, tj.Scalar, tj.Scalar]:
    """(start, whole_start, whole_stop, stop) of the keys that a tile of queries sees.

    All but stop are at block borders.
    """
    top = tile * BLOCK_M
    bottom = tl.minimum(top + BLOCK_M, queries) - 1
    start = tl.load(first + top) // BLOCK_N * BLOCK_N
    stop = tl.load(last + bottom) + 1
    common_start, common_stop = tl.load(first + bottom), tl.load(last + top) + 1
    whole_start, whole_stop = whole_tiles(start, stop, common_start, common_stop, BLOCK_N)
    return start, whole_start, whole_stop, stop
