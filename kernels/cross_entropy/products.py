"""Matrix products of a chunk, written where the result belongs.

CPUs without units for them multiply 16-bit matrices slowly: fp16 at 1 to 31 GFLOP/s where fp32 has
140 to 170 (docs/lab-notes.md). There operands are widened in blocks of the vocabulary: the copy
stays small, the sums are fp32. So they are, too, where a CPU would round to 16 bits what is summed
in more.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

BLOCK = 4096  # vocabulary entries widened at once


def logits_into(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """Compute out [n, V] = x weight^T; out has the dtype of x, or fp32."""
    if out.dtype == x.dtype and multiplies(x.device.type, x.dtype):
        torch.mm(x, weight.T, out=out)
    elif x.is_cuda:
        torch.mm(x, weight.T, out_dtype=out.dtype, out=out)
    else:
        wide = x.float()
        for part in _blocks(weight):
            if out.dtype == torch.float32:
                torch.mm(wide, weight[part].float().T, out=out[:, part])
            else:
                out[:, part] = wide @ weight[part].float().T


def hidden_gradient_into(out: Tensor, g: Tensor, weight: Tensor) -> None:
    """Compute out [n, D] = g weight; g has the dtype of weight or, on a CPU, fp32."""
    if g.dtype == weight.dtype and multiplies(g.device.type, g.dtype):
        torch.mm(g, weight, out=out)
        return
    wide = torch.zeros(out.shape, dtype=torch.float32)
    for part in _blocks(weight):
        wide.addmm_(g[:, part].float(), weight[part].float())
    out.copy_(wide)


def weight_gradient_into(out: Tensor, g: Tensor, x: Tensor, first: bool) -> None:
    """Compute out [V, D] = g^T x if first, else add it to out, with one rounding.

    out and g have the dtype of x, or fp32.
    """
    if not x.is_cuda and not (g.dtype == out.dtype == x.dtype and multiplies("cpu", x.dtype)):
        wide = x.float()
        for part in _blocks(out):
            product = g[:, part].T.float() @ wide
            out[part] = product if first else product.add_(out[part])
    elif out.dtype == x.dtype:
        torch.mm(g.T, x, out=out) if first else torch.addmm(out, g.T, x, out=out)
    # cuBLAS there has no such product for all layouts
    elif torch.cuda.get_device_capability(x.device) < (8, 0):
        out.copy_(g.T @ x) if first else out.add_(g.T @ x)
    elif first:
        torch.mm(g.T, x, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, g.T, x, out_dtype=out.dtype, out=out)


def half_product_into(
    out: Tensor, g: Tensor, x: Tensor, scales: tuple[Tensor, Tensor], alpha: float, first: bool
) -> None:
    """Compute fp16 out [V, D] = alpha (g scales[0])^T (x scales[1]) if first, else add it to out.

    bf16 g is written over on a GPU.
    """
    if not x.is_cuda:
        wide = x.float() * (scales[0] * scales[1] * alpha)
        for part in _blocks(out):
            product = g[:, part].T.float() @ wide
            out[part] = product if first else product.add_(out[part])
        return
    g_half, x_half = g.view(torch.float16), torch.empty_like(x, dtype=torch.float16)
    # In its own memory: an element is read and written by one thread
    torch.mul(g, scales[0], out=g_half)
    torch.mul(x, scales[1], out=x_half)
    torch.addmm(out, g_half.T, x_half, beta=0 if first else 1, alpha=alpha, out=out)


def multiplies(device: str, dtype: torch.dtype) -> bool:
    """Whether devices of this type multiply matrices of this dtype at speed."""
    return (
        device == "cuda" or dtype.itemsize >= 4 or (dtype == torch.bfloat16 and _has_bf16_units())
    )


@cache
def _has_bf16_units() -> bool:
    units = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(units.get("avx512_bf16") or units.get("amx_bf16"))


def _blocks(matrix: Tensor) -> Iterator[slice]:
    return (slice(first, first + BLOCK) for first in range(0, matrix.shape[0], BLOCK))
