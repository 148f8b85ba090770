"""The output matrix and the loss through it, as one module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.cross_entropy.interface import linear_cross_entropy


class LinearCrossEntropy(nn.Module):
    """Owns weight [V, D] (and bias [V]) and is the only place that uses them.

    ZeRO-3 gathers parameters around the forward pass of the module that registers them: a loss that
    read another module's weight would find an empty tensor. A weight tied to an embedding is
    registered in both.

    options: those of `linear_cross_entropy` that stay the same over calls.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None = None,
        *,
        softcap: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.softcap, self._options = weight, bias, softcap, options

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        token_weights: Tensor | None = None,
        normalizer: Tensor | float | None = None,
        z_loss: float = 0.0,
    ) -> Tensor | tuple[Tensor, ...]:
        """Logits [..., V] of hidden [..., D] without targets.

        Else the fields of `LossOutput` for hidden [N, D] and targets.

        A plain tuple: DeepSpeed's hooks look for tensors in those only.
        """
        if targets is None:
            logits = F.linear(hidden, self.weight, self.bias)
            return (
                logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
            )
        return tuple(
            linear_cross_entropy(
                hidden,
                self.weight,
                targets,
                token_weights=token_weights,
                normalizer=normalizer,
                bias=self.bias,
                z_loss=z_loss,
                softcap=self.softcap,
                **self._options,
            )
        )
