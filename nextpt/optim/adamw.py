"""AdamW that clips and guards on the device: a bad step changes nothing, and nobody waits for the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from nextpt.config import OptimizerSection


class GuardedAdamW(torch.optim.AdamW):
    """torch's fused AdamW, given the global gradient norm and the guard's verdict as device scalars before each step.

    The fused kernel takes `grad_scale` (gradients are divided by it: clipping) and `found_inf` (1:
    weights, moments and step counts stay as they are: the guard). Both are computed without reading
    anything on the host.

    verdict: returns this step's norm over all ranks (fp32 scalar) and whether the step must change
    nothing (bool scalar); a norm that is not finite or negative must come with true. DeepSpeed
    steps group by group, so it is asked several times.
    """

    def __init__(
        self,
        groups: list[dict],
        section: OptimizerSection,
        verdict: Callable[[], tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__(groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=True)
        self._clip, self._verdict = section.grad_clip, verdict

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        norm, bad = self._verdict()
        self.found_inf = bad.float()
        # A bad norm must not turn the scale into NaN: the fused kernel divides before it looks at
        # found_inf.
        scale = (norm / self._clip).clamp(min=1.0) if self._clip else torch.ones_like(norm)
        self.grad_scale = torch.where(bad, torch.ones_like(scale), scale)
        super().step(closure)


def parameter_groups(model: nn.Module, section: OptimizerSection) -> list[dict]:
    """Two groups: matrices that decay, and vectors (norms, biases) and embeddings that do not.

    Chosen by name and full shape; under ZeRO-3 a parameter's own shape is empty and `ds_shape` is
    the full one.
    """
    decay, keep = [], []
    for name, parameter in model.named_parameters():
        (
            decay
            if decays(name, getattr(parameter, "ds_shape", parameter.shape), section)
            else keep
        ).append(parameter)
    groups = [
        {"params": decay, "weight_decay": section.weight_decay},
        {"params": keep, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def decays(name: str, shape: Sequence[int], section: OptimizerSection) -> bool:
    """Whether weight decay applies to a parameter of this name and full shape."""
    return len(shape) >= 2 and (section.decay_embeddings or "embed_tokens" not in name)
