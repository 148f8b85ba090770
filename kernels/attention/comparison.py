"""Comparison of an implementation of attention with the reference, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.attention import reference
from kernels.attention.call import AttentionCall, AttentionOutput
from kernels.attention.documents import PackedDocuments
from kernels.attention.intervals import Slices

# Of the largest value, by type: fp16 rounds to 0.0005 of each, bf16 to 0.004
TOLERANCE = {torch.float32: 0.02, torch.float16: 0.02, torch.bfloat16: 0.05}
TOKENS, DOCUMENT = 200, 77


def difference(
    implementation: Callable[[Tensor, Tensor, Tensor, AttentionCall], AttentionOutput],
    device: torch.device | str,
    dtype: torch.dtype = torch.float16,
    *,
    window: int | None = 90,
    sinks: bool = False,
    head_dim: int = 64,
    group: int = 2,
) -> str | None:
    """Return how an implementation fails, or differs from the reference; None where it does not.

    Forward and backward are compared, with documents.

    Args:
        implementation: what is compared.
        device: where to run it.
        dtype: of queries, keys and values.
        window: keys that a query sees.
        sinks: whether a logit per head takes part in the softmax.
        head_dim: width of queries, keys and values.
        group: queries per key head, of which there are two.
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
    try:
        for function in (implementation, reference.run):
            out = function(q, k, v, call).out
            results.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
    except Exception as error:  # whatever the compiler or the driver raises
        message = str(error).splitlines()[0] if str(error) else ""
        return f"it fails: {type(error).__name__}: {message}"
    worst = max(
        float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in zip(*results, strict=True)
    )
    return None if worst < TOLERANCE[dtype] else f"its results are off by {worst:.2g}"
