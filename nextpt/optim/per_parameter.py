"""Optimizers that step one parameter after another by a pure function."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nextpt.optim.guarded import GuardedOptimizer, Shard
from nextpt.optim.spec import OptimizerSpec, Verdict


class PerParameterSpec(OptimizerSpec):
    """Description of an optimizer whose step is `update`."""

    @abstractmethod
    def update(
        self,
        weight: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        options: Mapping[str, Any],
        updates: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """New weight and new state of one parameter, or of this rank's part of it.

        Must not change its arguments and must not wait for the device. The guard decides whether
        the result is taken.

        Args:
            weight: fp32 [n].
            gradient: fp32 [n], of the loss by the weight, clipped.
            state: Kind -> value before the step; [n] for kinds with the parameter's shape.
            options: The group's options and `lr`.
            updates: Steps that the optimizer made before this one, fp32 scalar.
        """

    def build(self, groups: list[dict[str, Any]], verdict: Verdict) -> GuardedOptimizer:
        """The optimizer that calls `update`."""
        return PerParameterOptimizer(groups, self, verdict)


class PerParameterOptimizer(GuardedOptimizer):
    """Steps one parameter after another by `PerParameterSpec.update`, clipped and guarded.

    It takes as much additional memory as the update of the largest shard.
    """

    def __init__(
        self, groups: list[dict[str, Any]], spec: PerParameterSpec, verdict: Verdict
    ) -> None:
        super().__init__(groups, {"lr": spec.section.lr})
        self.guard(spec, verdict)
        self._compute = spec.update

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # takes no closure
        """Update every parameter that has a gradient, unless the step is bad."""
        norm, bad = self.verdict()
        factor = self.clip_factor(norm, bad)
        for group in self.param_groups:
            options = {key: value for key, value in group.items() if key != "params"}
            for flat in group["params"]:
                # An engine may make a step while it is built, before there is any state.
                if flat.grad is None or flat not in self.shards:
                    continue
                for shard in self.shards[flat]:
                    self._update(shard, shard.view(flat.grad) / factor, options, bad)
                self.state[flat]["step"] += ~bad

    def _update(
        self, shard: Shard, gradient: Tensor, options: Mapping[str, Any], bad: Tensor
    ) -> None:
        weight, state = shard.view(shard.flat), self.shard_state(shard)
        updates = self.state[shard.flat]["step"]
        new_weight, new_state = self._compute(weight, gradient, state, options, updates)
        # Selected, not multiplied: 0 * NaN is NaN.
        for old, new in ((weight, new_weight), *((state[k], new_state[k]) for k in state)):
            old.copy_(torch.where(bad, old, new))
