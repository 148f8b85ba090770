"""Learning-rate schedules as pure functions of the step: resuming needs no scheduler state."""

from __future__ import annotations

import math

from nextpt.config import BatchSchedule, Config


def learning_rate(config: Config, step: int, batches: BatchSchedule | None = None) -> float:
    """Learning rate of an optimizer step, 1 to config.total_steps.

    Warm-up is linear, from lr / warmup to lr. Then, by `schedule.kind`:

    - cosine: arXiv 1608.03983 without restarts, down to final_ratio at the last step;
    - wsd: constant, then linear down over `schedule.decay` (arXiv 2404.06395; linear as in arXiv
      2405.18392), by default the last 20 % of the run;
    - constant.
    """
    schedule, peak = config.schedule, config.optimizer.lr
    now, end = step, config.total_steps
    if schedule.unit == "tokens":
        batches = batches or config.batches
        now, end = batches.consumed_tokens(now), batches.consumed_tokens(end)
    if now < schedule.warmup:
        return peak * now / schedule.warmup
    low = schedule.final_ratio
    if schedule.kind == "cosine":
        progress = (now - schedule.warmup) / max(end - schedule.warmup, 1)
        return peak * (low + (1 - low) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2)
    if schedule.kind == "wsd":
        decay = schedule.decay or max(round(0.2 * end), 1)
        remaining = max(end - now, 0) / decay
        return peak * (low + (1 - low) * min(remaining, 1.0))
    return peak
