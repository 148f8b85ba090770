"""The row work of `rows.py` as one Triton kernel: one program per row, two passes over it, in place.

Pass 1 keeps a running maximum and the sum of exponentials without the targets (online softmax, arXiv 1805.02867).
Pass 2 writes the gradient; the row is then in the L2 cache (132 rows of 128K bf16 logits are 34 MB of the 50 MB of a
Hopper GPU). Targets are scalars that stay in L1: they are read again per block rather than carried.

The gradient may lie in the logits' own bytes, also when these are fp32 and it is 16 bits wide: block b of the gradient
ends where block b of the logits does or before, and a barrier parts the loads of a block from its stores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cross_entropy.chunking import padded
from kernels.cross_entropy.rows import Coefficients, Statistics

MAX_BLOCK = 32768  # 32 elements per thread at 32 warps: 0 spills on sm_90 (kernels/bench/compiled.py)


@triton.jit
def _tanh(x):
    """tanh with a relative error near 1e-7 everywhere. libdevice's does not run in the interpreter."""
    e = tl.exp2(-2.885390081777927 * tl.abs(x))
    large = tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    s = x * x
    small = x * (1.0 + s * (-0.3333333333333333 + s * (0.13333333333333333 + s * (-0.05396825396825397 + s * 0.021869488536155203))))
    return tl.where(tl.abs(x) < 0.3, small, large)


@triton.jit
def _tanh_slope(x):
    """1 - tanh^2, which would lose its digits as |x| grows."""
    e = tl.exp2(-2.885390081777927 * tl.abs(x))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0 without losing a small x (Goldberg 1991, theorem 4)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _expm1_of_minus(x):
    """exp(-x) - 1 for x >= 0 without losing a small x."""
    series = -x * (1.0 - x * (0.5 - x * (0.16666666666666666 - x * (0.041666666666666664 - x * 0.008333333333333333))))
    return tl.where(x < 0.1, series, tl.exp(-x) - 1.0)


@triton.jit
def _transform(raw, bias, columns, keep, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """Logits as the loss sees them, fp32."""
    z = raw.to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + columns, mask=keep, other=0.0).to(tl.float32)
    if HAS_CAP:
        z = softcap * _tanh(z / softcap)
    return z


@triton.jit
def row_kernel(logits, gradient, bias, targets, nats, peak, log_sum, total, hits, weight_b, weight_linear, weight_square,
               weight_flat, vocabulary, width, logits_stride, gradient_stride, softcap, TARGETS: tl.constexpr,
               HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, LINEAR: tl.constexpr, SQUARE: tl.constexpr, FLAT: tl.constexpr,
               DESCRIBE: tl.constexpr, GRADIENT: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """See rows.work. width: the vocabulary rounded up to 64, so that masks of loads are whole vectors."""
    row = tl.program_id(0).to(tl.int64)  # row x stride passes 2^31 before either factor does
    logits += row * logits_stride
    targets += row * TARGETS
    nats += row * TARGETS
    hits += row * TARGETS
    lanes = tl.arange(0, BLOCK)

    if DESCRIBE:
        m = tl.full((), float("-inf"), tl.float32)
        rest = tl.full((), 0.0, tl.float32)
        added = tl.full((), 0.0, tl.float32)
        misses = tl.full((), 0, tl.int32)
        for start in range(0, width, BLOCK):
            columns = start + lanes
            inside = columns < vocabulary
            raw = tl.load(logits + columns, mask=columns < width, other=0.0)
            z = tl.where(inside, _transform(raw, bias, columns, inside, softcap, HAS_BIAS, HAS_CAP), float("-inf"))
            counted = inside
            for k in tl.static_range(TARGETS):
                t = tl.load(targets + k)
                there = (t >= 0) & (t < vocabulary)
                at = tl.load(logits + t, mask=there, other=0.0)
                z_t = _transform(at, bias, t, there, softcap, HAS_BIAS, HAS_CAP)
                counted = counted & (columns != t)
                beaten = tl.max(((z >= z_t) & (columns != t)).to(tl.int32))
                misses = misses | tl.where(there, beaten << k, 1 << k)
            new = tl.maximum(m, tl.max(z))
            e = tl.where(counted, tl.exp2((z - new) * 1.4426950408889634), 0.0)
            rest = rest * tl.exp2((m - new) * 1.4426950408889634) + tl.sum(e)
            added += tl.sum(tl.where(inside, z, 0.0))
            m = new
        # `rest` has all columns but the targets; they are added back one by one, each column once.
        everything = rest
        for k in tl.static_range(TARGETS):
            t = tl.load(targets + k)
            there = (t >= 0) & (t < vocabulary)
            for j in tl.static_range(k):
                there = there & (tl.load(targets + j) != t)
            at = tl.load(logits + t, mask=there, other=0.0)
            z_t = _transform(at, bias, t, there, softcap, HAS_BIAS, HAS_CAP)
            everything += tl.where(there, tl.exp(z_t - m), 0.0)
        ls = tl.log(everything)
        for k in tl.static_range(TARGETS):
            t = tl.load(targets + k)
            there = (t >= 0) & (t < vocabulary)
            others = rest
            for j in tl.static_range(TARGETS):
                u = tl.load(targets + j)
                counts = (u >= 0) & (u < vocabulary) & (u != t)
                for i in tl.static_range(j):
                    counts = counts & (tl.load(targets + i) != u)
                at = tl.load(logits + u, mask=counts, other=0.0)
                z_u = _transform(at, bias, u, counts, softcap, HAS_BIAS, HAS_CAP)
                others += tl.where(counts, tl.exp(z_u - m), 0.0)
            at = tl.load(logits + t, mask=there, other=0.0)
            z_t = _transform(at, bias, t, there, softcap, HAS_BIAS, HAS_CAP) - m
            e_t = tl.exp(z_t)
            confident = others < e_t
            value = tl.where(confident, _log1p(others / tl.where(confident, e_t, 1.0)), ls - z_t)
            # No target: 0. One that is not in the vocabulary: nan, for it cannot be an error here.
            tl.store(nats + k, tl.where(there, value, tl.where(t < 0, 0.0, float("nan"))))
            tl.store(hits + k, ((misses >> k) & 1) == 0)
        tl.store(peak + row, m)
        tl.store(log_sum + row, ls)
        tl.store(total + row, added)
    else:
        m = tl.load(peak + row)
        ls = tl.load(log_sum + row)

    if GRADIENT:
        gradient += row * gradient_stride
        weight_b += row * TARGETS
        a = tl.full((), 0.0, tl.float32)
        for k in tl.static_range(TARGETS):
            a += tl.where(tl.load(targets + k) >= 0, tl.load(weight_b + k), 0.0)
        if LINEAR:
            a += tl.load(weight_linear + row)
        if SQUARE:
            a += 2.0 * tl.load(weight_square + row) * (m + ls)
        flat = tl.full((), 0.0, tl.float32)
        if FLAT:
            flat = tl.load(weight_flat + row)
        live = (a != 0.0) | (flat != 0.0)  # a row without weight is zeroed unread: it may hold inf or nan
        # The targets' entries are kept in registers: the loop below writes over the logits.
        place = tl.arange(0, SLOTS)
        slot = place < TARGETS
        t_k = tl.load(targets + place, mask=slot, other=-1)
        there = slot & (t_k >= 0) & (t_k < vocabulary)
        at = tl.load(logits + t_k, mask=there, other=0.0).to(tl.float32)
        if HAS_BIAS:
            at += tl.load(bias + t_k, mask=there, other=0.0).to(tl.float32)
        mine = tl.zeros_like(at)
        for j in tl.static_range(TARGETS):
            mine += tl.where(tl.load(targets + j) == t_k, tl.load(weight_b + j), 0.0)
        tl.debug_barrier()  # nats were stored by one thread and are read by many
        known = tl.load(nats + place, mask=there, other=0.0)
        entry = mine * _expm1_of_minus(known) + (a - mine) * tl.exp(-known) + flat
        if HAS_CAP:
            entry = entry * _tanh_slope(at / softcap)
        if live:
            for start in range(0, width, BLOCK):
                columns = start + lanes
                inside = columns < vocabulary
                z = tl.load(logits + columns, mask=columns < width, other=0.0).to(tl.float32)
                if HAS_BIAS:
                    z += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
                slope = 1.0
                if HAS_CAP:
                    slope = _tanh_slope(z / softcap)
                    z = softcap * _tanh(z / softcap)
                g = (a * tl.exp2(((z - m) - ls) * 1.4426950408889634) + flat) * slope
                g = tl.where(inside, g, 0.0)
                tl.debug_barrier()
                tl.store(gradient + columns, g.to(gradient.dtype.element_ty), mask=columns < width)
            tl.debug_barrier()
            tl.store(gradient + t_k, entry.to(gradient.dtype.element_ty), mask=there)
        else:
            nothing = tl.zeros((BLOCK,), gradient.dtype.element_ty)
            for start in range(0, width, BLOCK):
                columns = start + lanes
                tl.store(gradient + columns, nothing, mask=columns < width)


def work(logits: Tensor, gradient: Tensor | None, bias: Tensor | None, targets: Tensor, softcap: float | None,
         statistics: Statistics, coefficients: Coefficients | None, known: bool, block: int | None = None) -> None:
    """As rows.work, for fp32 statistics. Rows must start at multiples of 64 elements and be readable up to the next one."""
    rows, vocabulary = logits.shape
    if rows == 0:
        return
    block = block or min(triton.next_power_of_2(padded(vocabulary)), MAX_BLOCK)
    c = coefficients or Coefficients(statistics.peak, None, None, None)
    unused = statistics.peak
    row_kernel[(rows,)](
        logits, logits if gradient is None else gradient, unused if bias is None else bias, targets, *statistics,
        c.b, *(unused if t is None else t for t in c[1:]), vocabulary, padded(vocabulary), logits.stride(0),
        0 if gradient is None else gradient.stride(0), float(softcap or 1.0), TARGETS=targets.shape[1], HAS_BIAS=bias is not None,
        HAS_CAP=softcap is not None, LINEAR=c.linear is not None, SQUARE=c.square is not None, FLAT=c.flat is not None,
        DESCRIBE=not known, GRADIENT=gradient is not None, SLOTS=triton.next_power_of_2(targets.shape[1]), BLOCK=block, num_warps=warps(block),
    )


def warps(block: int) -> int:
    """32 elements per thread, 4 to 32 warps: the fewest registers without spilling (kernels/bench/compiled.py)."""
    return max(4, min(32, block // 1024))
