"""Stopping before the last step: save if the grace period allows it, and say how to resume."""

from __future__ import annotations

from typing import NoReturn

from nextpt.base.errors import TrainingStopped
from nextpt.job.signals import resume_command
from nextpt.train.checkpointing import TrainingCheckpoints
from nextpt.train.context import TrainingContext


def save_and_stop(
    step: int, context: TrainingContext, checkpoints: TrainingCheckpoints
) -> NoReturn:
    """Save `step`, unless the last save took longer than the time that is left. Collective.

    Args:
        step: Number of completed steps.
        context: Its job knows the signal and when it came; one rank or more received it.
        checkpoints: Saves the state and knows how long the last save took.

    Raises:
        TrainingStopped: Always, with the command that resumes the run.
    """
    job, grace_seconds = context.job, context.config.checkpoint.grace_seconds
    answers = context.group.all_gather(
        [job.stop.signal_name, job.stop.seconds_left(grace_seconds), checkpoints.save_seconds]
    )
    signal_name = next(name for name, _, _ in answers if name)
    left = min(seconds for _, seconds, _ in answers if seconds is not None)
    longest_save = max((seconds for _, _, seconds in answers if seconds is not None), default=None)
    reason = "the save failed"
    if step > checkpoints.saved_step:
        if longest_save is not None and longest_save > left:
            reason = (
                f"the last save took {longest_save:.1f} s and {max(left, 0.0):.1f} s of"
                f" checkpoint.grace_seconds = {grace_seconds:g} were left"
            )
        else:
            checkpoints.save(step, wait=True)
    job.set_phase("save", step)
    checkpoints.poll(wait=True)
    outcome = "saved" if step else "nothing to save yet"
    if step > checkpoints.saved_step:
        kept = checkpoints.saved_step
        outcome = f"not saved, for {reason}; the checkpoint of step {kept} is kept"
    raise TrainingStopped(
        f"stopped by {signal_name} after step {step} ({outcome}); to resume: {resume_command()}"
    )
