"""Cross-entropy through all logits at once and autograd: the definition that others are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.choice import Implementation


def run(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, valid: Tensor, scale: Tensor,
        z_loss: float, softcap: float | None, chunk_tokens: int | None) -> tuple[Tensor, ...]:
    """scale [N]: token weight / normalizer, 0 where not `valid`. Returns the fields of LossOutput."""
    logits = (hidden @ weight.T).to(scale.dtype)
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    lse = logits.logsumexp(-1)
    nats = (lse - logits.gather(1, targets.unsqueeze(1)).squeeze(1)) * valid
    z_part = z_loss * (scale * lse.square()).sum()
    loss = (scale * nats).sum() + z_part
    return loss, z_part.detach(), nats.detach(), lse.detach(), (logits.argmax(-1) == targets) & valid


IMPLEMENTATION = Implementation("reference", run, frozenset({"cpu", "cuda"}))
