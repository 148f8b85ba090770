"""Output layer with a fused cross-entropy: the vocabulary matrix and its loss as one module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.cross_entropy.interface import LossOutput, linear_cross_entropy


class LinearCrossEntropy(nn.Module):
    """Output matrix [V, D] (and bias [V]) with its logits and its fused cross-entropy.

    ZeRO-3 gathers parameters around the forward pass of the module that registers them: a loss
    that read another module's weight would find an empty tensor. A weight tied to an embedding is
    registered in both modules.

    Args:
        weight: [V, D].
        bias: [V], or None.
        softcap: cap c of the logits, c tanh(z / c), or None.
        options: further arguments of `linear_cross_entropy` that stay the same over calls.
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
        self.weight = weight
        self.bias = bias
        self.softcap = softcap
        self._options = options

    if TYPE_CHECKING:  # torch.nn.Module.__call__ is untyped

        @overload
        def __call__(self, hidden: Tensor) -> Tensor: ...

        @overload
        def __call__(
            self,
            hidden: Tensor,
            targets: Tensor,
            token_weights: Tensor | None = None,
            weight_sum: Tensor | float | None = None,
            z_loss_coefficient: float = 0.0,
        ) -> LossOutput: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Tensor | LossOutput:
            """As `forward`, through the hooks of the module."""

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        token_weights: Tensor | None = None,
        weight_sum: Tensor | float | None = None,
        z_loss_coefficient: float = 0.0,
    ) -> Tensor | LossOutput:
        """Compute logits, or the loss where there are targets.

        Args:
            hidden: [..., D] for logits, [N, D] for a loss.
            targets: int64 [N], or None for logits.
            token_weights: [N]; 1 unless given.
            weight_sum: divisor of the weighted sum; the sum of `token_weights` unless given.
            z_loss_coefficient: factor of lse^2.

        Returns:
            Logits [..., V] without targets, else the `LossOutput` of `linear_cross_entropy`.
        """
        if targets is None:
            logits = F.linear(hidden, self.weight, self.bias)
            if self.softcap is None:
                return logits
            return self.softcap * torch.tanh(logits / self.softcap)
        return linear_cross_entropy(
            hidden,
            self.weight,
            targets,
            token_weights=token_weights,
            weight_sum=weight_sum,
            bias=self.bias,
            z_loss_coefficient=z_loss_coefficient,
            softcap=self.softcap,
            **self._options,
        )
