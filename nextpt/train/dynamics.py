"""How training goes, from numbers that a step makes anyway: the gradient noise scale, and how far weights move.

Noise scale (McCandlish et al., arXiv 1812.06162, appendix A.1). A step has M micro-batches over all
ranks, of weights W_m that sum to W (targets, where all weigh 1). With g_m the mean gradient of
micro-batch m, G that of the step, and tr(S) the trace of the covariance of one target's gradient,

    sum_m (W_m / W) E|g_m|^2 = |G|^2 + tr(S) M / W        E|G_step|^2 = |G|^2 + tr(S) / W

so that two norms give unbiased estimates of both unknowns: tr(S) = (left - right) W / (M - 1),
|G|^2 = right - tr(S) / W. B_simple = tr(S) / |G|^2, in targets: below it a larger batch saves as
many steps as it costs, above it does not. Of one step the estimates scatter widely, and |G|^2 may
be negative: take the ratio of two means over many steps (`noise_scale`), never the mean of ratios.
Targets of one sequence depend on each other; since whole sequences are drawn, that is part of the
noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Elements that an update is computed of at a time, so that it takes no memory to speak of
CHUNK = 2**24
KINDS = {
    "embed_tokens": "embedding",
    "lm_head": "output",
    ".attention.": "attention",
    ".ffn.": "feed_forward",
}


class GradientNoise:
    """Hears the gradient of every micro-batch of a step, before it is added up or sent anywhere, where `active` is set.

    scale: what the loss is multiplied by before the backward pass. Costs one reading of each
    gradient, in those steps only.
    """

    def __init__(self, module: nn.Module, device: torch.device, scale: float) -> None:
        self.active, self._scale, self._device = False, scale, device
        # Sum over micro-batches of (W_m / W) |g_m|^2
        self._small = torch.zeros((), dtype=torch.float64, device=device)
        self._squares: list[Tensor] = []
        for parameter in module.parameters():
            parameter.register_hook(self._hear)

    def _hear(self, gradient: Tensor) -> None:
        if self.active:
            self._squares.append(
                torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32).double().square()
            )

    def begin(self, active: bool) -> None:
        """A step begins, which is measured or not."""
        self.active = active
        self._small.zero_()
        self._squares.clear()

    def end_micro_batch(self, weights: Tensor, weight_sum: Tensor) -> None:
        """A micro-batch's backward pass is done. weights: its own sum of weights.

        weight_sum: the whole step's.
        """
        if self.active and self._squares:
            # The gradient heard is scale * (W_m / W) g_m; a micro-batch without a target has none.
            square = (
                torch.stack(self._squares).sum()
                * (weight_sum / weights.clamp(min=1e-30))
                / self._scale**2
            )
            self._small += torch.where(weights > 0, square, 0.0)
        self._squares.clear()

    def estimate(
        self,
        all_sum: Callable[[Tensor], Tensor],
        micro_batches: int,
        weight_sum: Tensor,
        norm: float,
    ) -> dict[str, float] | None:
        """{"trace": tr(S), "square": |G|^2} of the step, None for one of a single micro-batch or not finite. Collective, waits.

        micro_batches: of all ranks. norm: of the step's gradient, before clipping.
        """
        if not self.active or micro_batches < 2:
            return None
        small, total = float(all_sum(self._small.clone())), float(weight_sum)
        trace = (small - norm**2) * total / (micro_batches - 1)
        square = norm**2 - trace / total if total else math.nan
        return (
            {"trace": trace, "square": square}
            if math.isfinite(trace) and math.isfinite(square)
            else None
        )


def noise_scale(estimates: Iterable[dict[str, float]]) -> float | None:
    """B_simple of many steps, in targets: mean trace / mean square.

    None where the mean square is not positive.
    """
    found = list(estimates)
    square = sum(e["square"] for e in found)
    return sum(e["trace"] for e in found) / square if square > 0 else None


def kind_of(name: str) -> str:
    """What a parameter belongs to: embedding, output, attention, feed_forward or norms."""
    if name.endswith("norm.weight"):
        return "norms"
    return next(kind for part, kind in KINDS.items() if part in name)


@dataclass(frozen=True)
class AdamWUpdates:
    """What AdamW's next or last update depends on beside weights and moments. updates: how many were made."""

    lr: float
    betas: tuple[float, float]
    eps: float
    updates: float

    def update(self, weight: Tensor, mean: Tensor, square: Tensor, weight_decay: float) -> Tensor:
        """What was taken from the weights last (arXiv 1711.05101, algorithm 2), its decay reckoned of the weights after it."""
        first, second = (1 - beta**self.updates for beta in self.betas)
        return self.lr * (
            mean / first / ((square / second).sqrt() + self.eps) + weight_decay * weight
        )


def update_ratios(
    shares: Iterable[tuple[str, float, dict[str, Tensor]]],
    adamw: AdamWUpdates,
    all_sum: Callable[[Tensor], Tensor],
    device: torch.device,
) -> dict[str, float]:
    """Kind of parameter -> |last update| / |weights|, L2 norms over all ranks. Collective, waits.

    shares: (name, weight decay, fp32 views "weight", "exp_avg" and "exp_avg_sq") of what this rank
    holds.
    """
    names = sorted({"norms", *KINDS.values()})
    sums = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
    for name, decay, tensors in shares:
        row = names.index(kind_of(name))
        for weight, mean, square in zip(
            *(tensors[k].split(CHUNK) for k in ("weight", "exp_avg", "exp_avg_sq")), strict=True
        ):
            step = adamw.update(weight, mean, square, decay)
            sums[row] += torch.stack([step.double().square().sum(), weight.double().square().sum()])
    found = all_sum(sums).tolist()
    return {
        name: math.sqrt(step / weight)
        for name, (step, weight) in zip(names, found, strict=True)
        if weight > 0 and adamw.updates
    }
