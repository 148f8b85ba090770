"""Spike detector: decides on the device whether a step's loss and gradient norm are acceptable.

A step is bad when its loss or its gradient norm is not finite, or lies far above those of the last
accepted steps:

    above median + spike_sigma * max(1.4826 * MAD, floor)    of the last `window` accepted steps

for the loss in nats per token, and for the logarithm of the norm, because norms are positive and
scatter by factors. 1.4826 * MAD (median absolute deviation) estimates the standard deviation of
normal data; half of the window may be outliers before it breaks down. Only a full window rejects
spikes, and only upward ones: a loss that falls is never a spike.

What follows from bad steps is decided on the host: see rollback_policy.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nextpt.config import GuardSection

REASONS = ("", "loss not finite", "gradient not finite", "loss spike", "gradient spike")
# Standard deviation of normal data / MAD: 1 / (the normal distribution's third quartile)
NORMAL = 1.4826
# Least standard deviations assumed, of the loss (nats) and of log norm: where nearly nothing
# scatters, nearly everything would be a spike. At 8 of them a loss within 0.08 nats, or a norm
# within 3.3 times its median, never is. The logarithm of the norm has tails: healthy runs go 7 of
# its own deviations up, but to 2.5 times the median only (docs/reliability.md).
FLOORS = (0.01, 0.15)
LEAST_NORM = 1e-30  # has a logarithm, and is below any gradient that fp32 weights would feel


@dataclass(frozen=True)
class StepVerdict:
    """Verdict on one step, read from the device.

    Attributes:
        reason: Why the step is bad; one of REASONS, "" for an accepted step.
        loss: Nats per token over all ranks, without z-loss.
        z_loss: Nats per token over all ranks.
        grad_norm: Norm of the gradient before clipping.
        loss_limit: Loss above which the step is a spike; infinite while the window is not full.
        grad_norm_limit: The same of the norm.
    """

    reason: str
    loss: float
    z_loss: float
    grad_norm: float
    loss_limit: float
    grad_norm_limit: float


class SpikeDetector:
    """Statistics of accepted steps and the verdict on the next one, on the device.

    All ranks must pass the same numbers. Only `read` and `state` wait for the device.

    Args:
        section: Width of the window and number of standard deviations.
        device: Where the statistics are kept.
    """

    def __init__(self, section: GuardSection, device: torch.device) -> None:
        self.section = section
        # Rows: loss, log norm. Column n % window holds the n-th accepted step since `reset`.
        self._values = torch.zeros(2, section.window, dtype=torch.float64, device=device)
        self._accepted = torch.zeros((), dtype=torch.int64, device=device)
        self._columns = torch.arange(section.window, device=device)
        self._floors = torch.tensor(FLOORS, dtype=torch.float64, device=device)
        self._unread: list[Tensor] = []

    def classify(self, loss: Tensor, z_loss: Tensor, norm: Tensor) -> Tensor:
        """Decide whether a step is bad, without waiting for the device.

        An accepted step enters the statistics.

        Args:
            loss: Nats per token, z-loss included; fp64 scalar.
            z_loss: The part of `loss` that is z-loss; fp64 scalar.
            norm: Norm of the gradient, scalar; negative is DeepSpeed's mark for a bad one.

        Returns:
            Whether the step is bad, bool scalar.
        """
        loss, norm = loss - z_loss, norm.double()
        values = torch.stack([loss, norm.clamp(min=LEAST_NORM).log()])
        limits = self._limits()
        bad_norm = ~torch.isfinite(norm) | (norm < 0)
        above = values > limits
        flags = (~torch.isfinite(loss), bad_norm, above[0], above[1])
        reason = torch.zeros_like(self._accepted)
        for number in range(len(flags), 0, -1):  # the first reason overrides later ones
            reason = torch.where(flags[number - 1], number, reason)
        bad = reason > 0
        # Selected, not multiplied: 0 * NaN is NaN.
        replaced = (self._columns == self._accepted % self.section.window) & ~bad
        self._values = torch.where(replaced, values[:, None], self._values)
        self._accepted = self._accepted + ~bad
        self._unread.append(
            torch.stack([reason.double(), loss, z_loss, norm, limits[0], limits[1].exp()])
        )
        return bad

    def _limits(self) -> Tensor:
        """Limits of loss and log norm, fp64 [2]; infinite while the window is not full."""
        spike_sigma, window = self.section.spike_sigma, self.section.window
        if spike_sigma is None:
            return torch.full_like(self._floors, math.inf)
        centre = _median(self._values)
        sigma = torch.maximum(
            NORMAL * _median((self._values - centre[:, None]).abs()), self._floors
        )
        return torch.where(self._accepted >= window, centre + spike_sigma * sigma, math.inf)

    def reset(self) -> None:
        """Start the statistics anew: the next steps cannot be compared with those before."""
        self._accepted.zero_()

    def read(self) -> list[StepVerdict]:
        """Verdicts on the steps since the last call, oldest first; waits for the device."""
        rows = torch.stack(self._unread).tolist() if self._unread else []
        self._unread.clear()
        return [StepVerdict(REASONS[int(reason)], *numbers) for reason, *numbers in rows]

    def state(self) -> list[list[float]]:
        """(losses, log norms) of the accepted steps, oldest first; waits for the device."""
        count, window = int(self._accepted), self.section.window
        values = (
            self._values.roll(-(count % window), dims=1)
            if count >= window
            else self._values[:, :count]
        )
        rows: list[list[float]] = values.tolist()
        return rows

    def load_state(self, state: list[list[float]]) -> None:
        """Continue from what `state` returned, also with another window.

        Raises:
            ValueError, TypeError: When it is not such a state.
        """
        values = torch.tensor(state, dtype=torch.float64)
        if values.ndim != 2 or len(values) != 2 or not values.isfinite().all():
            raise ValueError("the spike detector's statistics are not two rows of finite numbers")
        values = values[:, -self.section.window :]
        self._values.zero_()
        self._values[:, : values.shape[1]] = values.to(self._values.device)
        self._accepted.fill_(values.shape[1])
        self._unread.clear()


def _median(values: Tensor) -> Tensor:
    """Median along the last axis: the middle value, or the mean of the two."""
    size = values.shape[-1]
    ordered = values.sort(dim=-1).values
    return (ordered[..., (size - 1) // 2] + ordered[..., size // 2]) / 2
