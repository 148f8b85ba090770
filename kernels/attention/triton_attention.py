"""Our own kernels: causal attention in Triton, forward and backward. See docs/kernels.md."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.attention import reference
from kernels.attention.documents import PackedDocuments, Packing
from kernels.attention.intervals import causal
from kernels.choice import TritonImplementation


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: Packing | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """See kernels.attention.attention."""
    from kernels.attention import ops  # registers operators, and needs triton

    intervals = (
        causal(q.shape[1], k.shape[1], window, q.device)
        if documents is None
        else documents.intervals(window)
    )
    out, lse = ops.attention(q, k, v, sinks, *intervals, scale, softcap or 0.0)
    return (out, lse) if return_lse else out


def _unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return _failure() if torch.cuda.is_available() else None


@functools.cache
def _failure() -> str | None:
    """Compare with the reference once per process, on this GPU: a compiler that is wrong here must not train anybody's model."""
    reason = difference(run, "cuda")
    if reason:
        warnings.warn(
            f"our Triton attention is not used on {torch.cuda.get_device_name()}: {reason}",
            stacklevel=2,
        )
    return reason


def difference(implementation: Callable[..., Tensor], device: str) -> str | None:
    """How an implementation fails or differs from the reference in fp16, forward or backward.

    None where it does not.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, 200, h, 64, generator=generator).to(device, torch.float16).requires_grad_()
        for h in (4, 2, 2)
    ]
    documents = PackedDocuments(torch.arange(200, device=device).unsqueeze(0) // 77)
    found = []
    try:
        for each in (implementation, reference.run):
            out = each(
                *inputs,
                documents=documents,
                window=90,
                scale=0.125,
                softcap=None,
                sinks=None,
                return_lse=False,
            )
            found.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
    except Exception as error:  # whatever the compiler or the driver raises
        return (
            f"it fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
    worst = max(
        float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in zip(*found, strict=True)
    )
    return None if worst < 0.02 else f"its results are off by {worst:.2g}"


IMPLEMENTATION = TritonImplementation(
    "triton",
    run,
    frozenset({"cuda"}),
    frozenset(
        {
            "documents",
            "window",
            "softcap",
            "sinks",
            "lse",
            "fp32",
            "values of another width than keys",
        }
    ),
    _unavailable,
)
