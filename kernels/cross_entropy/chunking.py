"""How many tokens have their logits at once: a function of shapes and a stated budget alone.

Workspace is what exists beside the inputs and the gradients that are returned: one slab of logits, which is turned
into its own gradient in place, and in 16 bits with several chunks an fp32 accumulator of the matrix gradient. Free
memory is never asked: the number of chunks changes the last bits, so it must be the same on every rank and after a
restart.

Relative error of a bf16 matrix gradient against fp64 by what sums the chunks (docs/kernels.md has the measured table):
one chunk, or an fp32 accumulator: 0.0017 at any count. The bf16 result itself: 0.0022 at 4 chunks, 0.0059 at 32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Gradient = Literal["precise", "small"]
MIB = 2**20
# CPU: 256 MiB of logits keep the matrix products at full speed; a laptop has little more to spare.
DEFAULT_BUDGET = {"cpu": 256 * MIB, "cuda": 2048 * MIB}
ALIGNMENT = 64  # elements: rows of logits start at multiples of 128 bytes, so that vector loads fit any vocabulary
ROW_MULTIPLE = 128  # rows of a chunk, for the tiles of the matrix products
SMALL_CHUNKS = 4  # most chunks that are summed in 16 bits
SMALL_ROWS = 1024  # the small mode does not go below this: thinner products waste the tensor cores


class BudgetError(ValueError):
    """The workspace budget holds no chunk; the message names one that does."""


@dataclass(frozen=True)
class Chunking:
    """rows: tokens per chunk, the last may have fewer. accumulator: whether chunks are summed in an fp32 matrix of
    their own. workspace: bytes beside inputs and returned gradients at the highest point."""

    rows: int
    chunks: int
    accumulator: bool
    workspace: int


def padded(vocabulary: int) -> int:
    """Elements from one row of logits to the next."""
    return -(-vocabulary // ALIGNMENT) * ALIGNMENT


def plan_chunks(tokens: int, width: int, vocabulary: int, *, logits_bytes: int, gradient_bytes: int | None,
                budget: int, mode: Gradient = "precise") -> Chunking:
    """Choose the chunks for N tokens, D width, V vocabulary.

    logits_bytes: of one logit in the slab. gradient_bytes: of one element of the matrix gradient that is returned,
    None when there is none. budget: bytes of workspace. mode: "precise" takes one chunk if that fits, else an fp32
    accumulator and the largest chunks that fit; "small" takes 4 chunks of at least 1024 tokens and sums them in the
    result, and does as "precise" where these do not fit. 4-byte results are accumulators themselves.

    Raises BudgetError when nothing fits.
    """
    row = padded(vocabulary) * logits_bytes
    if gradient_bytes is None or gradient_bytes >= 4:
        return _largest(tokens, row, 0, 0, budget)
    if mode == "small":
        count = min(SMALL_CHUNKS, max(tokens // SMALL_ROWS, 1))
        rows = _even(tokens, count)
        if rows * row <= budget:
            return Chunking(rows, _count(tokens, rows), False, rows * row)
    if tokens * row <= budget:
        return Chunking(max(tokens, 1), 1, False, tokens * row)
    wide = 4 * vocabulary * width
    # The result comes to be when the slab is gone, so the slab may lie where the result will.
    return _largest(tokens, row, wide, gradient_bytes * vocabulary * width, budget)


def _largest(tokens: int, row: int, accumulator: int, result: int, budget: int) -> Chunking:
    least = max(min(tokens, ROW_MULTIPLE), 1)
    room = budget - accumulator + min(result, accumulator)
    if budget < accumulator or room < least * row:
        need = max(accumulator, accumulator - min(result, accumulator) + least * row)
        hint = "" if not accumulator else f", of which {_mib(accumulator)} MiB are the fp32 accumulator"
        raise BudgetError(f"a workspace of {_mib(budget)} MiB is too small for the loss: {least} tokens at once take "
                          f"{_mib(need)} MiB{hint}; give at least that, or shorter micro-batches")
    rows = _even(tokens, _count(tokens, room // row))
    while rows > least and rows * row > room:  # rounding up to the multiple went over
        rows -= min(ROW_MULTIPLE, rows - least)
    return Chunking(rows, _count(tokens, rows), accumulator > 0, max(accumulator, accumulator - min(result, accumulator) + rows * row))


def _even(tokens: int, count: int) -> int:
    """Rows per chunk so that `count` chunks are alike and the last is not a sliver."""
    if count <= 1:
        return max(tokens, 1)
    return min(-(-tokens // (count * ROW_MULTIPLE)) * ROW_MULTIPLE, tokens)


def _count(tokens: int, rows: int) -> int:
    return max(-(-tokens // max(rows, 1)), 1)


def _mib(size: int) -> int:
    return -(-size // MIB)
