"""Row work of `rows.py` as one Triton kernel: one program per row, two passes over it, in place.

Pass 1 keeps a running maximum and the sum of exponentials without the targets (online softmax,
arXiv 1805.02867). Pass 2 writes the gradient; the row is then in the L2 cache (132 rows of 128K
bf16 logits are 34 MB of the 50 MB of a Hopper GPU). Targets are scalars that stay in L1: they are
read again per block rather than carried.

The gradient may lie in the logits' own bytes, also when these are fp32 and it is 16 bits wide:
block b of the gradient ends where block b of the logits does or before, and a barrier parts the
loads of a block from its stores.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import triton_jit as tj
from kernels.cross_entropy import rows
from kernels.cross_entropy.chunking import padded
from kernels.cross_entropy.rows import Coefficients, Statistics
from kernels.triton_jit import constants, device_guard, jit
from kernels.triton_math import LOG2_E, tanh, tanh_slope

MAX_BLOCK = 16384
NO_TARGET = tl.constexpr(rows.NO_TARGET)


class Options(NamedTuple):
    """Compile-time constants of the kernel.

    Attributes:
        TARGETS: targets per row.
        HAS_BIAS: whether a bias is added to the logits.
        HAS_CAP: whether they have a soft cap.
        LINEAR: whether the coefficient `linear` is there, see rows.py.
        SQUARE: whether the coefficient `square` is there.
        FLAT: whether the coefficient `flat` is there.
        DESCRIBE: whether the statistics are computed; else they are read.
        TOTAL: whether the sum of logits is computed.
        GRADIENT: whether the gradient is written.
        SLOTS: TARGETS rounded up to a power of two.
        BLOCK: columns at once.
    """

    TARGETS: int
    HAS_BIAS: bool
    HAS_CAP: bool
    LINEAR: bool
    SQUARE: bool
    FLAT: bool
    DESCRIBE: bool
    TOTAL: bool
    GRADIENT: bool
    SLOTS: int
    BLOCK: int


class Row(NamedTuple):
    """One row of logits in memory.

    Attributes:
        logits: [width], of which `vocabulary` count.
        bias: [vocabulary].
        targets: int64 [TARGETS].
        vocabulary: number of entries.
        width: the vocabulary rounded up to 64, so that masks of loads are whole vectors.
        softcap: cap of the logits.
    """

    logits: tj.Pointer
    bias: tj.Pointer
    targets: tj.Pointer
    vocabulary: tj.Scalar
    width: tj.Scalar
    softcap: tj.Scalar


class RowStatistics(NamedTuple):
    """Where the statistics of a row lie in memory: see `rows.Statistics`."""

    nats: tj.Pointer
    peak: tj.Pointer
    log_sum: tj.Pointer
    total: tj.Pointer
    hits: tj.Pointer


@jit
def _log1p(x: tj.Block) -> tj.Block:
    """log(1 + x) for x >= 0 without losing a small x (Goldberg 1991, theorem 4)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@jit
def _expm1_of_minus(x: tj.Block) -> tj.Block:
    """exp(-x) - 1 for x >= 0 without losing a small x."""
    tail = 0.16666666666666666 - x * (0.041666666666666664 - x * 0.008333333333333333)
    series = -x * (1.0 - x * (0.5 - x * tail))
    return tl.where(x < 0.1, series, tl.exp(-x) - 1.0)


@jit
def _uncapped_logits(
    row: Row, columns: tj.Block, load: tj.Block, inside: tj.Block, OPTIONS: tl.constexpr
) -> tj.Block:
    """Logits with bias, fp32. Columns are read where `load`, biases where `inside`."""
    z = tl.load(row.logits + columns, mask=load, other=0.0).to(tl.float32)
    if OPTIONS.HAS_BIAS:
        z += tl.load(row.bias + columns, mask=inside, other=0.0).to(tl.float32)
    return z


@jit
def _logits(
    row: Row, columns: tj.Block, load: tj.Block, inside: tj.Block, OPTIONS: tl.constexpr
) -> tj.Block:
    """Logits as the loss sees them, fp32; see `_uncapped_logits`."""
    z = _uncapped_logits(row, columns, load, inside, OPTIONS)
    if OPTIONS.HAS_CAP:
        z = row.softcap * tanh(z / row.softcap)
    return z


@jit
def _sums(row: Row, OPTIONS: tl.constexpr) -> tuple[tj.Scalar, tj.Scalar, tj.Scalar]:
    """(maximum m, sum of exp(z - m)) over all columns but the targets; the sum of all logits."""
    m = tl.full((), -1.0e38, tl.float32)  # finite: inf - inf would be nan
    rest = tl.full((), 0.0, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, row.width, OPTIONS.BLOCK):
        columns = start + tl.arange(0, OPTIONS.BLOCK)
        inside = columns < row.vocabulary
        z = _logits(row, columns, columns < row.width, inside, OPTIONS)
        if OPTIONS.TOTAL:
            total += tl.sum(tl.where(inside, z, 0.0))
        for k in tl.static_range(OPTIONS.TARGETS):
            inside = inside & (columns != tl.load(row.targets + k))
        z = tl.where(inside, z, float("-inf"))
        new = tl.maximum(m, tl.max(z))
        rest = rest * tl.exp2((m - new) * LOG2_E) + tl.sum(tl.exp2((z - new) * LOG2_E))
        m = new
    return m, rest, total


@jit
def _in_vocabulary(target: tj.Block, row: Row) -> tj.Block:
    return (target >= 0) & (target < row.vocabulary)


@jit
def _peak(row: Row, rival: tj.Scalar, OPTIONS: tl.constexpr) -> tj.Scalar:
    """Largest logit of the row. rival: of the columns that are no targets."""
    m = rival
    for k in tl.static_range(OPTIONS.TARGETS):
        t = tl.load(row.targets + k)
        there = _in_vocabulary(t, row)
        m = tl.maximum(m, tl.where(there, _logits(row, t, there, there, OPTIONS), float("-inf")))
    return m


@jit
def _describe(
    row: Row, statistics: RowStatistics, rival: tj.Scalar, rest: tj.Scalar, OPTIONS: tl.constexpr
) -> tuple[tj.Scalar, tj.Scalar]:
    """Store nats and hits of the targets; returns (peak, log_sum) of the row.

    rival, rest: of the other columns, from _sums.
    """
    m = _peak(row, rival, OPTIONS)
    rest = rest * tl.exp2((rival - m) * LOG2_E)
    everything = rest
    for k in tl.static_range(OPTIONS.TARGETS):  # each column once, however many targets it is
        t = tl.load(row.targets + k)
        counts = _in_vocabulary(t, row)
        for j in tl.static_range(k):
            counts = counts & (tl.load(row.targets + j) != t)
        z_t = _logits(row, t, counts, counts, OPTIONS)
        everything += tl.where(counts, tl.exp(z_t - m), 0.0)
    log_sum = tl.log(everything)
    for k in tl.static_range(OPTIONS.TARGETS):
        t = tl.load(row.targets + k)
        there = _in_vocabulary(t, row)
        z_t = _logits(row, t, there, there, OPTIONS)
        best = z_t > rival
        others = rest
        for j in tl.static_range(OPTIONS.TARGETS):
            u = tl.load(row.targets + j)
            counts = _in_vocabulary(u, row) & (u != t)
            for i in tl.static_range(j):
                counts = counts & (tl.load(row.targets + i) != u)
            z_u = _logits(row, u, counts, counts, OPTIONS)
            others += tl.where(counts, tl.exp(z_u - m), 0.0)
            best = best & ((z_t > z_u) | (u == t) | (u < 0) | (u >= row.vocabulary))
        e_t = tl.exp(z_t - m)
        confident = others < e_t
        odds = _log1p(others / tl.where(confident, e_t, 1.0))
        value = tl.where(confident, odds, log_sum - (z_t - m))
        # A target that is not in the vocabulary has nan: it cannot be an error here.
        absent = tl.where(t == NO_TARGET, 0.0, float("nan"))
        tl.store(statistics.nats + k, tl.where(there, value, absent))
        tl.store(statistics.hits + k, best & there)
    return m, log_sum


@jit
def _target_entries(
    row: Row,
    nats: tj.Pointer,
    weight_b: tj.Pointer,
    rest: tj.Scalar,
    flat: tj.Scalar,
    OPTIONS: tl.constexpr,
) -> tuple[tj.Block, tj.Block]:
    """(columns [SLOTS] of the targets, gradients there from their nats)."""
    slots = tl.arange(0, OPTIONS.SLOTS)
    t_k = tl.load(row.targets + slots, mask=slots < OPTIONS.TARGETS, other=-1)
    there = _in_vocabulary(t_k, row)
    # What weighs p and is the target's own, and the rest: not a - mine, whose error is that of
    # mine, however small the others are.
    mine = tl.zeros((OPTIONS.SLOTS,), tl.float32)
    others = tl.zeros((OPTIONS.SLOTS,), tl.float32)
    for j in tl.static_range(OPTIONS.TARGETS):
        same = tl.load(row.targets + j) == t_k
        b = tl.load(weight_b + j)
        mine += tl.where(same, b, 0.0)
        others += tl.where(same, 0.0, b)
    known = tl.load(nats + slots, mask=there, other=0.0)
    entry = mine * _expm1_of_minus(known) + (others + rest) * tl.exp(-known) + flat
    if OPTIONS.HAS_CAP:
        z_t = _uncapped_logits(row, t_k, there, there, OPTIONS)
        entry = entry * tanh_slope(z_t / row.softcap)
    return t_k, entry


@jit
def _write_gradient(
    row: Row,
    gradient: tj.Pointer,
    nats: tj.Pointer,
    weight_b: tj.Pointer,
    a: tj.Scalar,
    rest: tj.Scalar,
    flat: tj.Scalar,
    peak: tj.Scalar,
    log_sum: tj.Scalar,
    OPTIONS: tl.constexpr,
) -> None:
    """A p - b [target] + flat over one row, the targets' own entries from their nats."""
    # These are computed first, into registers: the loop below writes over the logits.
    t_k, entry = _target_entries(row, nats, weight_b, rest, flat, OPTIONS)
    for start in range(0, row.width, OPTIONS.BLOCK):
        columns = start + tl.arange(0, OPTIONS.BLOCK)
        inside = columns < row.vocabulary
        z = _uncapped_logits(row, columns, columns < row.width, inside, OPTIONS)
        slope = 1.0
        if OPTIONS.HAS_CAP:
            slope = tanh_slope(z / row.softcap)
            z = row.softcap * tanh(z / row.softcap)
        g = (a * tl.exp2(((z - peak) - log_sum) * LOG2_E) + flat) * slope
        g = tl.where(inside, g, 0.0)
        tl.debug_barrier()
        tl.store(gradient + columns, g.to(gradient.dtype.element_ty), mask=columns < row.width)
    tl.debug_barrier()
    tl.store(gradient + t_k, entry.to(gradient.dtype.element_ty), mask=_in_vocabulary(t_k, row))


@jit
def row_kernel(
    logits: tj.Pointer,
    gradient: tj.Pointer,
    bias: tj.Pointer,
    targets: tj.Pointer,
    nats: tj.Pointer,
    peak: tj.Pointer,
    log_sum: tj.Pointer,
    total: tj.Pointer,
    hits: tj.Pointer,
    weight_b: tj.Pointer,
    weight_linear: tj.Pointer,
    weight_square: tj.Pointer,
    weight_flat: tj.Pointer,
    vocabulary: tj.Scalar,
    width: tj.Scalar,
    logits_stride: tj.Scalar,
    gradient_stride: tj.Scalar,
    softcap: tj.Scalar,
    OPTIONS: tl.constexpr,
) -> None:
    """Do the work of one row; see rows.work, and Row for `width`."""
    number = tl.program_id(0).to(tl.int64)  # row x stride passes 2^31 before either factor does
    logits += number * logits_stride
    targets += number * OPTIONS.TARGETS
    nats += number * OPTIONS.TARGETS
    row = Row(logits, bias, targets, vocabulary, width, softcap)
    if OPTIONS.DESCRIBE:
        rival, rest, added = _sums(row, OPTIONS)
        outputs = RowStatistics(nats, peak, log_sum, total, hits + number * OPTIONS.TARGETS)
        m, ls = _describe(row, outputs, rival, rest, OPTIONS)
        tl.store(peak + number, m)
        tl.store(log_sum + number, ls)
        if OPTIONS.TOTAL:
            tl.store(total + number, added)
        tl.debug_barrier()  # nats were stored by one thread and are read by many
    else:
        m = tl.load(peak + number)
        ls = tl.load(log_sum + number)
    if OPTIONS.GRADIENT:
        gradient += number * gradient_stride
        weight_b += number * OPTIONS.TARGETS
        beside = tl.full((), 0.0, tl.float32)
        if OPTIONS.LINEAR:
            beside += tl.load(weight_linear + number)
        if OPTIONS.SQUARE:
            beside += 2.0 * tl.load(weight_square + number) * (m + ls)
        a = beside
        for k in tl.static_range(OPTIONS.TARGETS):
            a += tl.load(weight_b + k)
        flat = tl.full((), 0.0, tl.float32)
        if OPTIONS.FLAT:
            flat = tl.load(weight_flat + number)
        if (a != 0.0) | (flat != 0.0):
            _write_gradient(row, gradient, nats, weight_b, a, beside, flat, m, ls, OPTIONS)
        else:  # a row without weight is zeroed unread: it may hold inf or nan
            nothing = tl.zeros((OPTIONS.BLOCK,), gradient.dtype.element_ty)
            for start in range(0, width, OPTIONS.BLOCK):
                columns = start + tl.arange(0, OPTIONS.BLOCK)
                tl.store(gradient + columns, nothing, mask=columns < width)


def work(
    logits: Tensor,
    gradient: Tensor | None,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    statistics: Statistics,
    coefficients: Coefficients | None,
    known: bool,
) -> None:
    """Do the work of `rows.work`, for fp32 statistics.

    Rows must start at multiples of 64 elements and be readable up to the next one. Statistics that
    are written must be contiguous; of what is read a copy is made where it is not.
    """
    count, vocabulary = logits.shape
    if count == 0:
        return
    bias, targets = None if bias is None else bias.contiguous(), targets.contiguous()
    statistics = Statistics(*_dense(statistics)) if known else statistics
    coefficients = None if coefficients is None else Coefficients(*_dense(coefficients))
    if not all(t is None or t.is_contiguous() for t in statistics):
        raise ValueError("the kernel writes contiguous statistics only")
    block = block_size(vocabulary, softcap is not None)
    c = coefficients or Coefficients(statistics.peak, None, None, None)
    unused = statistics.peak
    options = Options(
        TARGETS=targets.shape[1],
        HAS_BIAS=bias is not None,
        HAS_CAP=softcap is not None,
        LINEAR=c.linear is not None,
        SQUARE=c.square is not None,
        FLAT=c.flat is not None,
        DESCRIBE=not known,
        TOTAL=statistics.total is not None,
        GRADIENT=gradient is not None,
        SLOTS=triton.next_power_of_2(targets.shape[1]),
        BLOCK=block,
    )
    with device_guard(logits):
        row_kernel[(count,)](
            *(logits, logits if gradient is None else gradient, unused if bias is None else bias),
            *(targets, *(unused if t is None else t for t in (*statistics, *c))),
            *(vocabulary, padded(vocabulary), logits.stride(0)),
            *(0 if gradient is None else gradient.stride(0), float(softcap or 1.0)),
            OPTIONS=constants(options),
            **compiler_options(block, amd=bool(torch.version.hip)),
        )


def _dense(tensors: Iterable[Tensor | None]) -> list[Any]:
    return [None if t is None else t.contiguous() for t in tensors]


def block_size(vocabulary: int, capped: bool) -> int:
    """Return the columns at once.

    A soft cap needs more registers than 32 warps have (python -m kernels.bench.compile_report).
    """
    largest = MAX_BLOCK // 2 if capped else MAX_BLOCK
    return min(int(triton.next_power_of_2(padded(vocabulary))), largest)


def compiler_options(block: int, amd: bool) -> dict[str, int | bool]:
    """Return what the compiler is told: 16 elements per thread, 128 to 1024 threads.

    amd: of a device of AMD, whose warps have 64 threads.

    Naming all registers that these may have keeps ptxas from spilling for the sake of a second
    block per multiprocessor, whose rows would not fit the L2 cache anyway.
    """
    warps = max(4, min(32, block // 512))
    options: dict[str, int | bool] = {"num_warps": warps, "enable_fp_fusion": True}
    if amd:
        return options | {"num_warps": max(2, warps // 2)}
    return options | {"maxnreg": min(65536 // (32 * warps), 128)}
