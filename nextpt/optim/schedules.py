"""The learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from nextpt.config import Config


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of optimizer step `step` (1 to config.total_steps).

    Warm-up is linear from lr / warmup to lr. cosine: arXiv 1608.03983 without restarts, down to
    final_ratio at the last step. wsd: constant, then linear down over the decay (arXiv 2404.06395;
    linear as in arXiv 2405.18392).
    """
    schedule, peak = config.schedule, config.optimizer.lr
    unit = config.tokens_per_step if schedule.unit == "tokens" else 1
    now, end = step * unit, config.total_steps * unit
    if now < schedule.warmup:
        return peak * now / schedule.warmup
    low = schedule.final_ratio
    if schedule.kind == "cosine":
        progress = (now - schedule.warmup) / max(end - schedule.warmup, 1)
        return peak * (low + (1 - low) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2)
    if schedule.kind == "wsd":
        decay = schedule.decay or max(round(0.2 * end), 1)
        left = max(end - now, 0) / decay
        return peak * (low + (1 - low) * min(left, 1.0))
    return peak
