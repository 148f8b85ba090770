"""Multiplication of a large tensor, in place, by a scalar that the host does not know."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import triton_jit as tj
from kernels.triton_jit import device_guard, jit

BLOCK = 4096


@jit
def scale_kernel(
    values: tj.Pointer,
    out: tj.Pointer,
    factor: tj.Pointer,
    count: tj.Scalar,
    BLOCK: tl.constexpr,
    ALWAYS: tl.constexpr,
) -> None:
    """Write one block of values * factor; unless ALWAYS nothing where the factor is 1."""
    f = tl.load(factor).to(tl.float32)
    if ALWAYS or f != 1.0:  # otherwise nothing is read: a gigabyte of gradient costs a launch
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        v = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, (v * f).to(out.dtype.element_ty), mask=inside)


def scale(values: Tensor, factor: Tensor, out: Tensor | None = None) -> None:
    """Compute out = values * factor.

    Args:
        values: contiguous.
        factor: a scalar on the same device.
        out: `values` itself unless given, or its bytes as another type of the same width.

    Raises:
        ValueError: a tensor is not contiguous.
    """
    if not values.is_contiguous() or not (out is None or out.is_contiguous()):
        raise ValueError("the kernel multiplies contiguous tensors only")
    if values.dtype == torch.float64:
        values.mul_(factor)
    elif values.numel():
        grid = (triton.cdiv(values.numel(), BLOCK),)
        target = values if out is None else out
        with device_guard(values):
            scale_kernel[grid](
                values,
                target,
                factor,
                values.numel(),
                BLOCK=BLOCK,
                ALWAYS=out is not None,
                enable_fp_fusion=True,
            )
