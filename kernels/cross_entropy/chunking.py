"""Chunks of tokens that have their logits at once: by shapes and a stated budget alone.

Workspace is what exists beside the inputs and the gradients that are returned: one slab of logits,
which is turned into its own gradient in place, and what sums the matrix gradient over several
chunks. Free memory is never asked: the number of chunks changes the last bits, so it must be the
same on every rank and after a restart.

A 16-bit matrix gradient is rounded once in any case, an error of 0.0017 of its norm. Added up in
bf16 it would be rounded once more per chunk (0.0025 to 0.0027 at 4 chunks, 0.0060 to 0.0087 at 32);
with fp16 sums it is 0.0017 to 0.0018 at 8 chunks and 0.0019 to 0.0020 at 32, with fp32 sums 0.0017
(python -m kernels.bench.gradient_error; docs/kernels.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Gradient = Literal["precise", "small"]
# In the result itself, in its memory as fp16, in a matrix of their own
Sums = Literal["result", "fp16", "fp32"]
MIB = 2**20
# CPU: 256 MiB of logits keep the matrix products at full speed; a laptop has little more to spare.
DEFAULT_BUDGET = {"cpu": 256 * MIB, "cuda": 2048 * MIB}
# elements: rows of logits start at multiples of 128 bytes, so that vector loads fit any vocabulary
ALIGNMENT = 64
ROW_MULTIPLE = 128  # rows of a chunk, for the tiles of the matrix products
SMALL_CHUNKS = 8  # that the small mode takes unless the budget asks for more
SMALL_ROWS = 1024  # tokens in them: thinner products waste the tensor cores
MOST_SMALL_CHUNKS = 32  # fp16 sums: an error of 0.0020


class BudgetError(ValueError):
    """The workspace budget holds no chunk; the message names one that does."""


@dataclass(frozen=True)
class Chunking:
    """How a loss is cut.

    Attributes:
        rows: tokens per chunk; the last may have fewer.
        chunks: number of chunks.
        sums: how the chunks of the matrix gradient are added up.
        workspace: bytes beside inputs and returned gradients at the highest point.
    """

    rows: int
    chunks: int
    sums: Sums
    workspace: int


def padded(vocabulary: int) -> int:
    """Return the elements from one row of logits to the next."""
    return -(-vocabulary // ALIGNMENT) * ALIGNMENT


def fixed_chunks(tokens: int, rows: int, gradient_bytes: int | None, mode: Gradient) -> Chunking:
    """Return chunks of `rows` tokens; the workspace is not known."""
    chunks = _count(tokens, rows)
    single = gradient_bytes != 2 or chunks == 1
    return Chunking(rows, chunks, "result" if single else "fp16" if mode == "small" else "fp32", 0)


def plan_chunks(
    tokens: int,
    width: int,
    vocabulary: int,
    *,
    logits_bytes: int,
    gradient_bytes: int | None,
    budget: int,
    mode: Gradient = "precise",
) -> Chunking:
    """Choose the chunks.

    Args:
        tokens: N.
        width: D.
        vocabulary: V.
        logits_bytes: of one logit in the slab.
        gradient_bytes: of one element of the matrix gradient that is returned; None when there is
            none. 4-byte results are sums themselves.
        budget: bytes of workspace.
        mode: "precise" takes one chunk if that fits, else fp32 sums and the largest chunks that
            fit; "small" takes 8 chunks of at least 1024 tokens, or as many more as the budget asks
            for, and fp16 sums, which need no memory.

    Raises:
        BudgetError: nothing fits.
    """
    row = padded(vocabulary) * logits_bytes
    if gradient_bytes is None or gradient_bytes >= 4:
        return _largest(tokens, row, 0, 0, budget)
    if mode == "small" and (plan := _small(tokens, row + 2 * width, budget)):
        return plan
    if tokens * row <= budget:
        return Chunking(max(tokens, 1), 1, "result", tokens * row)
    # The result comes to be when the slab is gone, so the slab may lie where the result will.
    return _largest(
        tokens, row, 4 * vocabulary * width, gradient_bytes * vocabulary * width, budget
    )


def _small(tokens: int, row: int, budget: int) -> Chunking | None:
    """row: bytes of logits and of the fp16 image of the hidden state of one token."""
    count = max(
        min(SMALL_CHUNKS, tokens // SMALL_ROWS),
        _count(tokens, budget // row) if row <= budget else MOST_SMALL_CHUNKS,
        1,
    )
    rows = _even(tokens, count)
    while rows > ROW_MULTIPLE and rows * row > budget:  # rounding up to the multiple went over
        rows -= ROW_MULTIPLE
    count = _count(tokens, rows)
    if rows * row > budget or count > MOST_SMALL_CHUNKS:
        return None
    return Chunking(rows, count, "fp16" if count > 1 else "result", min(rows, tokens) * row)


def _largest(tokens: int, row: int, sums: int, result: int, budget: int) -> Chunking:
    """sums, result: bytes of an fp32 matrix and of the 16-bit one that it becomes.

    0 where there is none.
    """
    least = max(min(tokens, ROW_MULTIPLE), 1)
    room = budget - sums + min(result, sums)
    if budget < sums or room < least * row:
        need = max(sums, sums - min(result, sums) + least * row)
        hint = (
            ""
            if not sums
            else (
                f", {_mib(sums)} MiB of them fp32 sums of the matrix gradient, which mode small"
                " does without"
            )
        )
        raise BudgetError(
            f"a workspace of {_mib(budget)} MiB is too small for the loss: {least} tokens at once"
            f" take {_mib(need)} MiB{hint}; give at least that, or shorter micro-batches"
        )
    rows = _even(tokens, _count(tokens, room // row))
    while rows > least and rows * row > room:  # rounding up to the multiple went over
        rows -= min(ROW_MULTIPLE, rows - least)
    workspace = max(sums, sums - min(result, sums) + min(rows, tokens) * row)
    return Chunking(rows, _count(tokens, rows), "fp32" if sums else "result", workspace)


def _even(tokens: int, count: int) -> int:
    """Rows per chunk so that `count` chunks are alike and the last is not a sliver."""
    if count <= 1:
        return max(tokens, 1)
    return min(-(-tokens // (count * ROW_MULTIPLE)) * ROW_MULTIPLE, tokens)


def _count(tokens: int, rows: int) -> int:
    return max(-(-tokens // max(rows, 1)), 1)


def _mib(size: int) -> int:
    return -(-size // MIB)
