"""AdamW (arXiv 1711.05101) on torch's fused kernel, with clipping and guard inside the kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nextpt.config import OptimizerSection
from nextpt.optim.guarded import GuardedOptimizer
from nextpt.optim.spec import OptimizerSpec, ParameterGroup, Shape, StateKind, Verdict

MOMENTS = (StateKind("exp_avg"), StateKind("exp_avg_sq"))


class FusedAdamW(GuardedOptimizer, torch.optim.AdamW):
    """torch's fused AdamW, guarded.

    The fused kernel takes `grad_scale` (gradients are divided by it: clipping) and `found_inf` (1:
    weights, moments and step counts stay as they are: the guard). Both are computed without reading
    anything on the host.
    """

    def __init__(self, groups: list[dict[str, Any]], spec: OptimizerSpec, verdict: Verdict) -> None:
        section = spec.section
        super().__init__(groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=True)
        self.guard(spec, verdict)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # takes no closure
        """Update every parameter that has a gradient, unless the step is bad."""
        norm, bad = self.verdict()
        self.found_inf = bad.float()
        self.grad_scale = self.clip_factor(norm, bad)
        super().step(closure)


class AdamW(OptimizerSpec):
    """AdamW: matrices decay; vectors (norms, biases) and, by default, embeddings do not."""

    kind = "adamw"

    def __init__(self, section: OptimizerSection) -> None:
        super().__init__(section)
        self.decayed = ParameterGroup("decay", MOMENTS, {"weight_decay": section.weight_decay})
        self.undecayed = ParameterGroup("no_decay", MOMENTS, {"weight_decay": 0.0})

    @property
    def groups(self) -> Sequence[ParameterGroup]:
        """Decayed parameters, then those that do not decay."""
        return self.decayed, self.undecayed

    def group_of(self, name: str, shape: Shape) -> ParameterGroup:
        """Matrices decay; embeddings only with `optimizer.decay_embeddings`."""
        decays = len(shape) >= 2 and (self.section.decay_embeddings or "embed_tokens" not in name)
        return self.decayed if decays else self.undecayed

    def build(self, groups: list[dict[str, Any]], verdict: Verdict) -> GuardedOptimizer:
        """An optimizer on torch's fused kernel."""
        return FusedAdamW(groups, self, verdict)

    def last_update(
        self,
        weight: Tensor,
        state: Mapping[str, Tensor],
        options: Mapping[str, float],
        updates: float,
    ) -> Tensor:
        """Algorithm 2 of the paper; the decay is computed from the weights after the step."""
        first, second = (1 - beta**updates for beta in self.section.betas)
        scale = (state["exp_avg_sq"] / second).sqrt() + self.section.eps
        update: Tensor = state["exp_avg"] / first / scale + options["weight_decay"] * weight
        return options["lr"] * update
