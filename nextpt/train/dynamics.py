"""Training dynamics: the gradient noise scale, and how far each step moves the weights.

Noise scale (McCandlish et al., arXiv 1812.06162, appendix A.1). A step has M micro-batches over all
ranks, of weights W_m that sum to W (targets, where all weigh 1). With g_m the mean gradient of
micro-batch m, G that of the step, and tr(S) the trace of the covariance of one target's gradient,

    sum_m (W_m / W) E|g_m|^2 = |G|^2 + tr(S) M / W        E|G_step|^2 = |G|^2 + tr(S) / W

so that two norms give unbiased estimates of both unknowns: tr(S) = (left - right) W / (M - 1),
|G|^2 = right - tr(S) / W. B_simple = tr(S) / |G|^2, in targets: below it a larger batch saves as
many steps as it costs, above it does not. Estimates of a single step scatter widely, and |G|^2 may
be negative: take the ratio of two means over many steps (`noise_scale`), never the mean of ratios.
Targets of one sequence depend on each other; since whole sequences are drawn, that is part of the
noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

# Part of a parameter's name -> what the parameter belongs to
COMPONENTS = {
    "embed_tokens": "embedding",
    "lm_head": "output",
    ".attention.": "attention",
    ".ffn.": "feed_forward",
    "mtp.": "mtp_projection",
}


class GradientNoise:
    """Gradient noise of single steps, from the gradient of every micro-batch.

    Hooks read each gradient before it is accumulated or reduced; they do so only in steps that are
    measured.

    Args:
        module: The module that is trained.
        device: Device of this rank.
        scale: Factor by which the loss is multiplied before the backward pass.
    """

    def __init__(self, module: nn.Module, device: torch.device, scale: float) -> None:
        self.active = False
        self._scale = scale
        # Sum over micro-batches of (W_m / W) |g_m|^2
        self._micro_batch_squares = torch.zeros((), dtype=torch.float64, device=device)
        self._squares: list[Tensor] = []
        for parameter in module.parameters():
            parameter.register_hook(self._on_gradient)  # type: ignore[no-untyped-call]  # torch

    def _on_gradient(self, gradient: Tensor) -> None:
        if self.active:
            self._squares.append(
                torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32).double().square()
            )

    def begin(self, active: bool) -> None:
        """Begin a step, which is measured where `active` is true."""
        self.active = active
        self._micro_batch_squares.zero_()
        self._squares.clear()

    def end_micro_batch(self, weights: Tensor, weight_sum: Tensor) -> None:
        """End the backward pass of a micro-batch.

        Args:
            weights: Sum of the micro-batch's token weights.
            weight_sum: Sum of the whole step's.
        """
        if self.active and self._squares:
            # A hook sees scale * (W_m / W) g_m; a micro-batch without a target has no gradient.
            square = (
                torch.stack(self._squares).sum()
                * (weight_sum / weights.clamp(min=1e-30))
                / self._scale**2
            )
            self._micro_batch_squares += torch.where(weights > 0, square, 0.0)
        self._squares.clear()

    def estimate(
        self,
        all_reduce: Callable[[Tensor], Tensor],
        micro_batches: int,
        weight_sum: Tensor,
        norm: float,
    ) -> dict[str, float] | None:
        """Estimates of the step that ended last. Collective; waits for the device.

        Args:
            all_reduce: Sums a tensor over the ranks that divide the data.
            micro_batches: Micro-batches of the step over all ranks.
            weight_sum: Sum of the step's token weights.
            norm: Norm of the step's gradient before clipping.

        Returns:
            {"trace": tr(S), "square": |G|^2}; None for a step that was not measured, has a single
            micro-batch, or gives no finite numbers.
        """
        if not self.active or micro_batches < 2:
            return None
        squares = float(all_reduce(self._micro_batch_squares.clone()))
        total = float(weight_sum)
        trace = (squares - norm**2) * total / (micro_batches - 1)
        square = norm**2 - trace / total if total else math.nan
        if not (math.isfinite(trace) and math.isfinite(square)):
            return None
        return {"trace": trace, "square": square}


def noise_scale(estimates: Iterable[dict[str, float]]) -> float | None:
    """B_simple of many steps, in targets: mean trace / mean square.

    None where the mean square is not positive.
    """
    steps = list(estimates)
    square = sum(estimate["square"] for estimate in steps)
    return sum(estimate["trace"] for estimate in steps) / square if square > 0 else None


def component_of(name: str) -> str:
    """What a parameter belongs to: embedding, output, attention, feed_forward, norms, ..."""
    if name.endswith("norm.weight"):
        return "norms"
    return next(component for part, component in COMPONENTS.items() if part in name)


def update_ratios(
    parts: Iterable[tuple[str, Tensor]],
    all_reduce: Callable[[Tensor], Tensor],
    device: torch.device,
) -> dict[str, float]:
    """|last update| / |weights| by component, L2 norms over all ranks.

    Collective; waits for the device.

    Args:
        parts: (Parameter name, fp64 [2]: squared norms of the last update and of the weights) of
            what this rank holds; over all ranks every element at most once. NaN for an update that
            is not known: its component is left out.
        all_reduce: Sums a tensor over the ranks that divide the data.
        device: Device of this rank.
    """
    names = sorted({"norms", *COMPONENTS.values()})
    sums = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
    for name, squares in parts:
        sums[names.index(component_of(name))] += squares
    totals = all_reduce(sums).tolist()
    return {
        name: math.sqrt(update / weight)
        for name, (update, weight) in zip(names, totals, strict=True)
        if weight > 0 and math.isfinite(update)
    }
