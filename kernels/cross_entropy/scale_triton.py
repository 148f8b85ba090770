"""Multiplying a large tensor by a scalar that the host does not know and that is nearly always 1."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def scale_kernel(values, factor, count, BLOCK: tl.constexpr):
    f = tl.load(factor).to(tl.float32)
    if f != 1.0:  # otherwise nothing is read: a gigabyte of gradient costs a launch
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        v = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(values + at, (v * f).to(values.dtype.element_ty), mask=inside)


def scale(values: Tensor, factor: Tensor) -> None:
    """values *= factor in place; values contiguous, factor a scalar on the same device."""
    if values.dtype == torch.float64:
        values.mul_(factor)
    elif values.numel():
        scale_kernel[(triton.cdiv(values.numel(), BLOCK),)](values, factor, values.numel(), BLOCK=BLOCK, enable_fp_fusion=True)
