"""Reference cross-entropy, all logits at once and autograd: what others are tested with."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cross_entropy.rows import Statistics


def statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None
) -> Statistics:
    """Return differentiable statistics.

    Logits are rounded to the inputs' dtype; sums are fp32.

    Args:
        hidden: [N, D].
        weight: [V, D].
        bias: [V] or None.
        targets: [N, K], -1 where there is none.
        softcap: cap of the logits, or None.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = (hidden @ weight.T).to(dtype)
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    lse, peak = logits.logsumexp(-1), logits.detach().amax(-1)
    target = logits.gather(1, targets.clamp_min(0))
    nats = torch.where(targets >= 0, lse.unsqueeze(1) - target, 0.0)
    others = torch.stack(
        [
            logits.detach().scatter(1, t.clamp_min(0).unsqueeze(1), -torch.inf).amax(-1)
            for t in targets.T
        ],
        1,
    )
    return Statistics(nats, peak, lse - peak, logits.sum(-1), (target > others) & (targets >= 0))
