"""Comparison of an implementation of attention with the reference, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.attention import reference
from kernels.attention.call import AttentionCall, AttentionOutput
from kernels.attention.documents import PackedDocuments
from kernels.attention.intervals import Slices
from kernels.trials import describe_failure

Attend = Callable[[Tensor, Tensor, Tensor, AttentionCall], AttentionOutput]
# Of the largest value, by type: fp16 rounds to 0.0005 of each, bf16 to 0.004
TOLERANCE = {torch.float32: 0.02, torch.float16: 0.02, torch.bfloat16: 0.05}
TOKENS, DOCUMENT = 200, 77


def largest_error(
    implementation: Attend,
    device: torch.device | str,
    dtype: torch.dtype = torch.float16,
    *,
    window: int | None = 90,
    sinks: bool = False,
    head_dim: int = 64,
    group: int = 2,
) -> float:
    """Return the largest error beside the reference, relative to the largest value.

    Of the outputs and of all gradients, with documents.

    Args:
        implementation: what is compared.
        device: where to run it.
        dtype: of queries, keys and values.
        window: keys that a query sees.
        sinks: whether a logit per head takes part in the softmax.
        head_dim: width of queries, keys and values.
        group: queries per key head, of which there are two.

    Raises:
        Exception: whatever the implementation, its compiler or the driver raises.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = [
        torch.randn(1, TOKENS, heads, head_dim, generator=generator).to(device, dtype)
        for heads in (2 * group, 2, 2)
    ]
    logits = torch.linspace(-1, 1, 2 * group).to(device) if sinks else None
    inputs = [t.requires_grad_() for t in (q, k, v, logits) if t is not None]
    ids = torch.arange(TOKENS, dtype=torch.int32, device=device).unsqueeze(0) // DOCUMENT
    starts = torch.arange(0, TOKENS + DOCUMENT, DOCUMENT, dtype=torch.int32, device=device)
    documents = PackedDocuments(ids, starts.clamp(max=TOKENS))
    slices = Slices.of(TOKENS, TOKENS)
    call = AttentionCall(slices, head_dim**-0.5, documents, window, sinks=logits)
    results = []
    for function in (implementation, reference.run):
        out = function(q, k, v, call).out
        results.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
    errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(*results, strict=True)]
    return float(torch.stack([error.detach().float() for error in errors]).max())  # NaN if one is


def difference(
    implementation: Attend,
    device: torch.device | str,
    dtype: torch.dtype = torch.float16,
    **shape: Any,
) -> str | None:
    """Return how an implementation fails, or differs from the reference; None where it does not.

    Arguments are those of `largest_error`.
    """
    try:
        error = largest_error(implementation, device, dtype, **shape)
    except Exception as failure:  # whatever the compiler or the driver raises
        return describe_failure(failure)
    return None if error < TOLERANCE[dtype] else f"its results are off by {error:.2g}"
