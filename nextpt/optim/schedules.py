"""Learning-rate schedules as pure functions of the step: resuming needs no scheduler state."""

from __future__ import annotations

import math

from nextpt.config import BatchSchedule, Config, ScheduleSection

DECAY_SHARE = 0.2  # of the run, where schedule.decay is not set (arXiv 2405.18392)


# schedule.batch_scaling -> power of the batch: Adam's below the critical batch is 1/2 (arXiv
# 2205.10287), that of plain SGD 1
BATCH_EXPONENTS = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


def learning_rate(config: Config, step: int, batches: BatchSchedule | None = None) -> float:
    """Learning rate of an optimizer step, 1 to the last one.

    Progress is counted in steps or in consumed tokens, by `schedule.unit`. Warm-up is linear, from
    lr / warmup to lr. Then, by `schedule.kind`:

    - cosine: arXiv 1608.03983 without restarts, down to final_ratio at the last step;
    - linear: down to final_ratio at the last step (arXiv 2502.15938);
    - wsd: constant, then down over `schedule.decay` (arXiv 2404.06395), linear or as
      1 - sqrt(share) (arXiv 2405.18392);
    - power: peak * (progress / power_from) ** -power_exponent once that is below the peak (arXiv
      2408.13359), then down as wsd;
    - constant.

    A decay to zero reaches zero at the step after the last, as torch's LinearLR and transformers'
    schedules do: a step with a rate of zero would change nothing.

    The peak is optimizer.lr, times (batch / train.global_batch_size) to the power of
    `schedule.batch_scaling`.

    Args:
        config: The run.
        step: The step.
        batches: Batch size by step; that of the config unless given.
    """
    schedule, batches = config.schedule, batches or config.batches
    peak = config.optimizer.lr
    if exponent := BATCH_EXPONENTS[schedule.batch_scaling]:
        ratio = batches.batch_size(step - 1) / config.train.global_batch_size
        peak *= ratio**exponent
    total = config.total_steps_with(batches)
    low = schedule.final_ratio
    lowest = total if low else total + 1  # step at which the decay ends
    now, end, bottom = (progress(config, s, batches) for s in (step, total, lowest))
    if now < schedule.warmup:
        return peak * now / schedule.warmup
    share = min((now - schedule.warmup) / max(bottom - schedule.warmup, 1), 1.0)
    if schedule.kind == "cosine":
        return peak * (low + (1 - low) * (1 + math.cos(math.pi * share)) / 2)
    if schedule.kind == "linear":
        return peak * (low + (1 - low) * (1 - share))
    if schedule.has_final_decay:
        decay = decay_length(schedule, end)
        remaining = min(max(bottom - now, 0) / (decay + bottom - end), 1.0)
        if schedule.decay_shape == "sqrt":
            remaining = 1 - math.sqrt(1 - remaining)
        return _stable(peak, schedule, min(now, end - decay)) * (low + (1 - low) * remaining)
    return peak


def progress(config: Config, step: int, batches: BatchSchedule) -> int:
    """Progress after `step` steps, in the unit of the schedule."""
    return batches.consumed_tokens(step) if config.schedule.unit == "tokens" else step


def decay_length(schedule: ScheduleSection, end: int) -> int:
    """Length of the final decay of a run of length `end`, both in the unit of the schedule."""
    return schedule.decay or max(min(round(DECAY_SHARE * end), end - schedule.warmup), 1)


def milestones(config: Config) -> list[tuple[int, str]]:
    """(step, event) of the parts of a schedule, in rising order; for people to read."""
    schedule, batches = config.schedule, config.batches
    end = progress(config, config.total_steps, batches)
    parts = [(schedule.warmup, "end of the warm-up")] if schedule.warmup else []
    decay_start = max(end - decay_length(schedule, end), 0) if schedule.has_final_decay else end
    if schedule.power_from is not None and schedule.power_from < decay_start:
        parts.append((schedule.power_from, "end of the peak"))
    if schedule.has_final_decay:
        parts.append((decay_start, "start of the decay"))
    to_step = batches.steps_for_tokens if schedule.unit == "tokens" else int
    steps = [(to_step(point), name) for point, name in parts if point <= end]
    return [*steps, (config.total_steps, "end")]


def _stable(peak: float, schedule: ScheduleSection, now: int) -> float:
    """Learning rate between warm-up and final decay."""
    if schedule.power_from is None or now <= schedule.power_from:
        return peak
    return float(peak * (now / schedule.power_from) ** -schedule.power_exponent)
