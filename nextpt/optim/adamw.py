"""AdamW (arXiv 1711.05101) on torch's fused kernel, with clipping and guard inside the kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nextpt.config import AdamWGroup, OptimizerSection
from nextpt.model import Parametrization
from nextpt.model.parametrization import Factors, Role
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


def adamw_groups(section: OptimizerSection, rules: Parametrization) -> dict[Role, ParameterGroup]:
    """Role -> group of the parameters that AdamW steps.

    Roles without options of their own in the config, or by the model's parametrization, share the
    groups "decay" and "no_decay".
    """
    shared = {"betas": section.betas, "eps": section.eps}
    decay, no_decay = (
        ParameterGroup(name, MOMENTS, {"weight_decay": weight_decay, **shared})
        for name, weight_decay in (("decay", section.weight_decay), ("no_decay", 0.0))
    )
    groups: dict[Role, ParameterGroup] = {
        "matrices": decay,
        "gates": decay,
        "embedding": decay if section.decay_embeddings else no_decay,
        "output": decay,
        "vectors": no_decay,
    }
    for role, group in groups.items():
        own = AdamWGroup() if role in ("matrices", "gates") else getattr(section, role)
        groups[role] = _own_group(role, group, own, rules.adamw(role), section.lr)
    factors = rules.adamw("final_norm")
    if factors == rules.adamw("vectors"):
        return groups | {"final_norm": groups["vectors"]}
    final_norm = _own_group("final_norm", no_decay, section.vectors, factors, section.lr)
    return groups | {"final_norm": final_norm}


def _own_group(
    role: Role, shared: ParameterGroup, own: AdamWGroup, factors: Factors, lr: float
) -> ParameterGroup:
    """Group of a role: the shared one unless it has options or factors of its own."""
    if own == AdamWGroup() and factors == Factors():
        return shared
    options = dict(shared.options)
    options |= own.model_dump(include={"weight_decay", "betas"}, exclude_none=True)
    options["weight_decay"] *= factors.weight_decay
    options["eps"] *= factors.eps
    return ParameterGroup(role, MOMENTS, options, (own.lr or lr) / lr * factors.lr)


class AdamW(OptimizerSpec):
    """AdamW: matrices decay; vectors (norms, biases) and, by default, embeddings do not."""

    kind = "adamw"

    def __init__(self, section: OptimizerSection, rules: Parametrization | None = None) -> None:
        super().__init__(section, rules)
        self._groups = adamw_groups(section, self.rules)

    @property
    def groups(self) -> Sequence[ParameterGroup]:
        """Decayed parameters, those that do not decay, and those with options of their own."""
        return list({group.name: group for group in self._groups.values()}.values())

    def group_of(self, name: str, shape: Shape) -> ParameterGroup:
        """Group of the parameter's role."""
        return self._groups[self.rules.role_of(name, shape)]

    def build(self, groups: list[dict[str, Any]], verdict: Verdict) -> GuardedOptimizer:
        """An optimizer on torch's fused kernel."""
        return FusedAdamW(groups, self, verdict)

    def last_update(
        self,
        weight: Tensor,
        state: Mapping[str, Tensor],
        options: Mapping[str, Any],
        updates: float,
    ) -> Tensor:
        """Algorithm 2 of the paper; the decay is computed from the weights after the step."""
        first, second = (1 - beta**updates for beta in options["betas"])
        scale = (state["exp_avg_sq"] / second).sqrt() + options["eps"]
        update: Tensor = state["exp_avg"] / first / scale + options["weight_decay"] * weight
        scaled: Tensor = options["lr"] * update
        return scaled
