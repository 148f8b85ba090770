"""The loss call: checks, defaults and the choice of implementation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.choice import Implementation, choose


class LossOutput(NamedTuple):
    """loss: fp32 scalar, sum_i w_i (nats_i + z lse_i^2) / normalizer. z_loss: its second part, detached.

    nats, lse: fp32 [N], unweighted, detached, nats 0 where ignored. hits: bool [N], whether the arg-max is the target.
    """

    loss: Tensor
    z_loss: Tensor
    nats: Tensor
    lse: Tensor
    hits: Tensor


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, token_weights: Tensor | None = None,
                         normalizer: Tensor | float | None = None, bias: Tensor | None = None, ignore_index: int = -100,
                         z_loss: float = 0.0, softcap: float | None = None, chunk_tokens: int | None = None,
                         implementation: str = "auto") -> LossOutput:
    """Weighted cross-entropy of softmax(hidden weight^T + bias) against targets, in nats.

    hidden [N, D] and weight [V, D] of one floating dtype; bias [V]; targets int64 [N], `ignore_index` where there is
    none; token_weights [N], 1 unless given; normalizer: what the weighted sum is divided by, from outside because it
    spans ranks and micro-batches; the sum of weights of this call unless given. z_loss: coefficient of lse^2.
    softcap c: logits become c tanh(z / c). chunk_tokens: tokens whose logits exist at once; from the workspace budget
    unless given (a function of shapes alone, so that a run repeats itself). Loss and nats are fp32 (fp64 for fp64).

    Raises ValueError for shapes that do not fit or an unknown implementation. Targets are not range-checked.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden [N, D] and weight [V, D] do not fit: {tuple(hidden.shape)}, {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be [{hidden.shape[0]}], got {tuple(targets.shape)}")
    if token_weights is not None and token_weights.shape != targets.shape:
        raise ValueError(f"token_weights must be [{hidden.shape[0]}], got {tuple(token_weights.shape)}")
    wide = torch.promote_types(hidden.dtype, torch.float32)
    valid = targets != ignore_index
    weights = valid.to(wide) if token_weights is None else token_weights.to(wide) * valid
    if normalizer is None:
        total = weights.sum()
        normalizer = torch.where(total > 0, total, 1.0)
    scale = weights / torch.as_tensor(normalizer, dtype=wide, device=hidden.device)
    chosen = choose(IMPLEMENTATIONS, ("torch",), implementation, hidden.device.type, ())
    return LossOutput(*chosen.run(hidden, weight, bias, torch.where(valid, targets, 0), valid, scale, z_loss, softcap, chunk_tokens))


from kernels.cross_entropy import chunked, reference  # noqa: E402

IMPLEMENTATIONS: dict[str, Implementation] = {i.name: i for i in (reference.IMPLEMENTATION, chunked.IMPLEMENTATION)}
