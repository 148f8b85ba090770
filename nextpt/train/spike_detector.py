"""The guard against NaN, infinities and spikes: whether a step counts is decided on the device, what follows on the host.

A step is bad when its loss or its gradient norm is not finite, or lies far above those of the last
accepted steps:

    above median + spikes * max(1.4826 * MAD, floor)    of the last `window` accepted steps

for the loss in nats per token, and for the logarithm of the norm, because norms are positive and
scatter by factors. 1.4826 * MAD (median absolute deviation) estimates the standard deviation of
normal data; half of the window may be outliers before it breaks down. Only a full window judges,
and only upward: a loss that falls is never a spike.
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
    """What the device found of one step. reason: of REASONS, "" when it was accepted. loss, z_loss: nats per token, over all ranks. Limits: those above which it is a spike; infinite while none is looked for."""

    reason: str
    loss: float
    z_loss: float
    grad_norm: float
    loss_limit: float
    norm_limit: float


class SpikeDetector:
    """The device's part: statistics of accepted steps, and the verdict on the next one.

    Only `read` and `state` wait for it.

    All ranks must give it the same numbers.
    """

    def __init__(self, section: GuardSection, device: torch.device) -> None:
        self.section = section
        # Rows: loss, log norm. Column n % window holds the n-th accepted step since the last
        # `forget`.
        self._values = torch.zeros(2, section.window, dtype=torch.float64, device=device)
        self._accepted = torch.zeros((), dtype=torch.int64, device=device)
        self._places = torch.arange(section.window, device=device)
        self._floors = torch.tensor(FLOORS, dtype=torch.float64, device=device)
        self._unread: list[Tensor] = []

    def classify(self, loss: Tensor, z_loss: Tensor, norm: Tensor) -> Tensor:
        """Whether the step is bad (bool scalar), without waiting for the device.

        An accepted one enters the statistics.

        loss, z_loss: fp64 scalars, z_loss a part of loss. norm: of the gradient; negative is
        DeepSpeed's mark for a bad one.
        """
        loss, norm = loss - z_loss, norm.double()
        values = torch.stack([loss, norm.clamp(min=LEAST_NORM).log()])
        limits = self._limits()
        bad_norm = ~torch.isfinite(norm) | (norm < 0)
        above = values > limits
        found = (~torch.isfinite(loss), bad_norm, above[0], above[1])
        reason = torch.zeros_like(self._accepted)
        for number in range(len(found), 0, -1):  # the first one has the last word
            reason = torch.where(found[number - 1], number, reason)
        bad = reason > 0
        # Selected, not multiplied: 0 * NaN is NaN.
        here = (self._places == self._accepted % self.section.window) & ~bad
        self._values = torch.where(here, values[:, None], self._values)
        self._accepted = self._accepted + ~bad
        self._unread.append(
            torch.stack([reason.double(), loss, z_loss, norm, limits[0], limits[1].exp()])
        )
        return bad

    def _limits(self) -> Tensor:
        """fp64 [2], infinite while the window is not full."""
        if self.section.spike_sigma is None:
            return torch.full_like(self._floors, math.inf)
        centre = _median(self._values)
        sigma = torch.maximum(
            NORMAL * _median((self._values - centre[:, None]).abs()), self._floors
        )
        return torch.where(
            self._accepted >= self.section.window, centre + self.section.spike_sigma * sigma, math.inf
        )

    def reset(self) -> None:
        """Begin the statistics anew: what comes now is not to be compared with what was."""
        self._accepted.zero_()

    def read(self) -> list[StepVerdict]:
        """What was found of the steps since the last call, in order; waits for the device."""
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
        return values.tolist()

    def load(self, state: list[list[float]]) -> None:
        """Go on from statistics, also of another window.

        Raises ValueError or TypeError where they are none.
        """
        kept = torch.tensor(state, dtype=torch.float64)
        if kept.ndim != 2 or len(kept) != 2 or not kept.isfinite().all():
            raise ValueError("the guard's statistics are not two rows of finite numbers")
        kept = kept[:, -self.section.window :]
        self._values.zero_()
        self._values[:, : kept.shape[1]] = kept.to(self._values.device)
        self._accepted.fill_(kept.shape[1])
        self._unread.clear()


def _median(values: Tensor) -> Tensor:
    """Along the last axis: the middle value, or the mean of the two."""
    size = values.shape[-1]
    ordered = values.sort(dim=-1).values
    return (ordered[..., (size - 1) // 2] + ordered[..., size // 2]) / 2
