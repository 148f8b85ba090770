"""The row work of `rows.py` as one Triton kernel: one program per row, two passes over it, in place.

Pass 1 keeps a running maximum and the sum of exponentials without the targets (online softmax,
arXiv 1805.02867). Pass 2 writes the gradient; the row is then in the L2 cache (132 rows of 128K
bf16 logits are 34 MB of the 50 MB of a Hopper GPU). Targets are scalars that stay in L1: they are
read again per block rather than carried.

The gradient may lie in the logits' own bytes, also when these are fp32 and it is 16 bits wide:
block b of the gradient ends where block b of the logits does or before, and a barrier parts the
loads of a block from its stores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cross_entropy import rows
from kernels.cross_entropy.chunking import padded
from kernels.cross_entropy.rows import Coefficients, Statistics
from kernels.triton_math import LOG2_E, tanh, tanh_slope

MAX_BLOCK = 16384
NO_TARGET = tl.constexpr(rows.NO_TARGET)


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0 without losing a small x (Goldberg 1991, theorem 4)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _expm1_of_minus(x):
    """exp(-x) - 1 for x >= 0 without losing a small x."""
    series = -x * (
        1.0
        - x
        * (0.5 - x * (0.16666666666666666 - x * (0.041666666666666664 - x * 0.008333333333333333)))
    )
    return tl.where(x < 0.1, series, tl.exp(-x) - 1.0)


@triton.jit
def _logits(
    logits, bias, columns, load, inside, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr
):
    """Logits as the loss sees them, fp32. Columns are read where `load`, biases where `inside`."""
    z = tl.load(logits + columns, mask=load, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_CAP:
        z = softcap * tanh(z / softcap)
    return z


@triton.jit
def _sums(
    logits,
    bias,
    targets,
    vocabulary,
    width,
    softcap,
    TARGETS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    TOTAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(maximum m, sum of exp(z - m)) over all columns but the targets, and the sum of all logits."""
    m = tl.full((), -1.0e38, tl.float32)  # finite: inf - inf would be nan
    rest = tl.full((), 0.0, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        z = _logits(logits, bias, columns, columns < width, inside, softcap, HAS_BIAS, HAS_CAP)
        if TOTAL:
            total += tl.sum(tl.where(inside, z, 0.0))
        for k in tl.static_range(TARGETS):
            inside = inside & (columns != tl.load(targets + k))
        z = tl.where(inside, z, float("-inf"))
        new = tl.maximum(m, tl.max(z))
        rest = rest * tl.exp2((m - new) * LOG2_E) + tl.sum(tl.exp2((z - new) * LOG2_E))
        m = new
    return m, rest, total


@triton.jit
def _describe(
    logits,
    bias,
    targets,
    nats,
    hits,
    rival,
    rest,
    vocabulary,
    softcap,
    TARGETS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    """Store nats and hits of the targets.

    (peak, log_sum) of the row. rival, rest: of the other columns, from _sums.
    """
    m = rival
    for k in tl.static_range(TARGETS):
        t = tl.load(targets + k)
        there = (t >= 0) & (t < vocabulary)
        m = tl.maximum(
            m,
            tl.where(
                there,
                _logits(logits, bias, t, there, there, softcap, HAS_BIAS, HAS_CAP),
                float("-inf"),
            ),
        )
    rest = rest * tl.exp2((rival - m) * LOG2_E)
    everything = rest
    for k in tl.static_range(TARGETS):  # each column once, however many targets it is
        t = tl.load(targets + k)
        counts = (t >= 0) & (t < vocabulary)
        for j in tl.static_range(k):
            counts = counts & (tl.load(targets + j) != t)
        z_t = _logits(logits, bias, t, counts, counts, softcap, HAS_BIAS, HAS_CAP)
        everything += tl.where(counts, tl.exp(z_t - m), 0.0)
    log_sum = tl.log(everything)
    for k in tl.static_range(TARGETS):
        t = tl.load(targets + k)
        there = (t >= 0) & (t < vocabulary)
        z_t = _logits(logits, bias, t, there, there, softcap, HAS_BIAS, HAS_CAP)
        best = z_t > rival
        others = rest
        for j in tl.static_range(TARGETS):
            u = tl.load(targets + j)
            counts = (u >= 0) & (u < vocabulary) & (u != t)
            for i in tl.static_range(j):
                counts = counts & (tl.load(targets + i) != u)
            z_u = _logits(logits, bias, u, counts, counts, softcap, HAS_BIAS, HAS_CAP)
            others += tl.where(counts, tl.exp(z_u - m), 0.0)
            best = best & ((z_t > z_u) | (u == t) | (u < 0) | (u >= vocabulary))
        e_t = tl.exp(z_t - m)
        confident = others < e_t
        value = tl.where(
            confident, _log1p(others / tl.where(confident, e_t, 1.0)), log_sum - (z_t - m)
        )
        # A target that is not in the vocabulary has nan: it cannot be an error here.
        tl.store(nats + k, tl.where(there, value, tl.where(t == NO_TARGET, 0.0, float("nan"))))
        tl.store(hits + k, best & there)
    return m, log_sum


@triton.jit
def _write_gradient(
    logits,
    gradient,
    bias,
    targets,
    nats,
    weight_b,
    a,
    rest,
    flat,
    peak,
    log_sum,
    vocabulary,
    width,
    softcap,
    TARGETS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A p - b [target] + flat over one row, the targets' own entries from their nats."""
    # These are made first, in registers: the loop below writes over the logits.
    place = tl.arange(0, SLOTS)
    t_k = tl.load(targets + place, mask=place < TARGETS, other=-1)
    there = (t_k >= 0) & (t_k < vocabulary)
    # What weighs p and is the target's own, and the rest. Not a - mine, whose error is that of mine,
    # however small the others are.
    mine = tl.zeros((SLOTS,), tl.float32)
    others = tl.zeros((SLOTS,), tl.float32)
    for j in tl.static_range(TARGETS):
        same = tl.load(targets + j) == t_k
        b = tl.load(weight_b + j)
        mine += tl.where(same, b, 0.0)
        others += tl.where(same, 0.0, b)
    known = tl.load(nats + place, mask=there, other=0.0)
    entry = mine * _expm1_of_minus(known) + (others + rest) * tl.exp(-known) + flat
    if HAS_CAP:
        z_t = tl.load(logits + t_k, mask=there, other=0.0).to(tl.float32)
        if HAS_BIAS:
            z_t += tl.load(bias + t_k, mask=there, other=0.0).to(tl.float32)
        entry = entry * tanh_slope(z_t / softcap)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        z = tl.load(logits + columns, mask=columns < width, other=0.0).to(tl.float32)
        if HAS_BIAS:
            z += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
        slope = 1.0
        if HAS_CAP:
            slope = tanh_slope(z / softcap)
            z = softcap * tanh(z / softcap)
        g = (a * tl.exp2(((z - peak) - log_sum) * LOG2_E) + flat) * slope
        g = tl.where(inside, g, 0.0)
        tl.debug_barrier()
        tl.store(gradient + columns, g.to(gradient.dtype.element_ty), mask=columns < width)
    tl.debug_barrier()
    tl.store(gradient + t_k, entry.to(gradient.dtype.element_ty), mask=there)


@triton.jit
def row_kernel(
    logits,
    gradient,
    bias,
    targets,
    nats,
    peak,
    log_sum,
    total,
    hits,
    weight_b,
    weight_linear,
    weight_square,
    weight_flat,
    vocabulary,
    width,
    logits_stride,
    gradient_stride,
    softcap,
    TARGETS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    LINEAR: tl.constexpr,
    SQUARE: tl.constexpr,
    FLAT: tl.constexpr,
    DESCRIBE: tl.constexpr,
    TOTAL: tl.constexpr,
    GRADIENT: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See rows.work. width: the vocabulary rounded up to 64, so that masks of loads are whole vectors."""
    row = tl.program_id(0).to(tl.int64)  # row x stride passes 2^31 before either factor does
    logits += row * logits_stride
    targets += row * TARGETS
    nats += row * TARGETS
    if DESCRIBE:
        rival, rest, added = _sums(
            logits,
            bias,
            targets,
            vocabulary,
            width,
            softcap,
            TARGETS,
            HAS_BIAS,
            HAS_CAP,
            TOTAL,
            BLOCK,
        )
        m, ls = _describe(
            logits,
            bias,
            targets,
            nats,
            hits + row * TARGETS,
            rival,
            rest,
            vocabulary,
            softcap,
            TARGETS,
            HAS_BIAS,
            HAS_CAP,
        )
        tl.store(peak + row, m)
        tl.store(log_sum + row, ls)
        if TOTAL:
            tl.store(total + row, added)
        tl.debug_barrier()  # nats were stored by one thread and are read by many
    else:
        m = tl.load(peak + row)
        ls = tl.load(log_sum + row)
    if GRADIENT:
        gradient += row * gradient_stride
        weight_b += row * TARGETS
        rest = tl.full((), 0.0, tl.float32)
        if LINEAR:
            rest += tl.load(weight_linear + row)
        if SQUARE:
            rest += 2.0 * tl.load(weight_square + row) * (m + ls)
        a = rest
        for k in tl.static_range(TARGETS):
            a += tl.load(weight_b + k)
        flat = tl.full((), 0.0, tl.float32)
        if FLAT:
            flat = tl.load(weight_flat + row)
        if (a != 0.0) | (flat != 0.0):
            _write_gradient(
                logits,
                gradient,
                bias,
                targets,
                nats,
                weight_b,
                a,
                rest,
                flat,
                m,
                ls,
                vocabulary,
                width,
                softcap,
                TARGETS,
                HAS_BIAS,
                HAS_CAP,
                SLOTS,
                BLOCK,
            )
        else:  # a row without weight is zeroed unread: it may hold inf or nan
            nothing = tl.zeros((BLOCK,), gradient.dtype.element_ty)
            for start in range(0, width, BLOCK):
                columns = start + tl.arange(0, BLOCK)
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
    """As rows.work, for fp32 statistics.

    Rows must start at multiples of 64 elements and be readable up to the next one.
    """
    count, vocabulary = logits.shape
    if count == 0:
        return
    block = block_size(vocabulary, softcap is not None)
    c = coefficients or Coefficients(statistics.peak, None, None, None)
    unused = statistics.peak
    row_kernel[(count,)](
        logits,
        logits if gradient is None else gradient,
        unused if bias is None else bias,
        targets,
        *(unused if t is None else t for t in statistics),
        c.b,
        *(unused if t is None else t for t in c[1:]),
        vocabulary,
        padded(vocabulary),
        logits.stride(0),
        0 if gradient is None else gradient.stride(0),
        float(softcap or 1.0),
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
        **compiler_options(block),
    )


def block_size(vocabulary: int, capped: bool) -> int:
    """Columns at once.

    A soft cap needs more registers than 32 warps have (python -m kernels.bench.compile_report).
    """
    return min(triton.next_power_of_2(padded(vocabulary)), MAX_BLOCK // 2 if capped else MAX_BLOCK)


def compiler_options(block: int) -> dict[str, int | bool]:
    """16 elements per thread, 4 to 32 warps.

    Naming all registers that these may have keeps ptxas from spilling for the sake of a second
    block per multiprocessor, whose rows would not fit the L2 cache anyway.
    """
    warps = max(4, min(32, block // 512))
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return options if torch.version.hip else options | {"maxnreg": min(65536 // (32 * warps), 128)}
