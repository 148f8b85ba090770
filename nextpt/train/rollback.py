"""Rollback: returns training to a checkpoint from before bad steps and skips their data."""

from __future__ import annotations

from nextpt.base.errors import UserError
from nextpt.events import RollbackEvent
from nextpt.train.checkpointing import TrainingCheckpoints
from nextpt.train.context import TrainingContext
from nextpt.train.rollback_policy import RollbackPolicy


class Rollback:
    """Returns training to the newest checkpoint before the bad steps and skips their data."""

    def __init__(
        self, context: TrainingContext, policy: RollbackPolicy, checkpoints: TrainingCheckpoints
    ) -> None:
        self.context = context
        self.policy = policy
        self.checkpoints = checkpoints

    def run(self) -> int:
        """Roll back. Collective.

        The result is saved at once, so that the next start of the job continues from it.

        Returns:
            The number of completed steps from which training continues.

        Raises:
            UserError: When there is no checkpoint before the bad steps, or when
                guard.max_rollbacks rollbacks in a row led no further.
        """
        policy, loader = self.policy, self.context.loader
        first, last, bad_steps = policy.first_bad_step, policy.last_bad_step, policy.describe()
        self.context.job.set_phase("rolling back", last)
        self.checkpoints.poll(wait=True)
        stop_sequence = loader.position(last)
        state = self.checkpoints.rollback(first)
        if state is None:
            raise UserError(
                f"{bad_steps}, and there is no checkpoint from before them to roll back to; look at"
                " the data and the learning rate, save more often (checkpoint.every_steps), or"
                " increase guard.rollback_after or guard.spike_sigma"
            )
        step = int(state["step"])
        policy.record_rollback(state.get("guard"))
        if policy.rollbacks > policy.section.max_rollbacks:
            raise UserError(
                f"{bad_steps}, after {policy.section.max_rollbacks} rollbacks to step {step}"
                " (guard.max_rollbacks); look at the data, at metrics.jsonl and at the learning"
                " rate, resume from an earlier checkpoint with checkpoint.resume=STEP, or increase"
                " guard.spike_sigma"
            )
        loader.load_state(state["data"])
        first_sequence = loader.position(step)
        loader.skip_data(step, stop_sequence)
        self.checkpoints.save(step, wait=True)
        self.context.events.publish(
            RollbackEvent(
                step=step,
                first_bad=first,
                last_bad=last,
                reason=policy.reason,
                first_sequence=first_sequence,
                stop_sequence=stop_sequence,
                rollbacks=policy.rollbacks,
            )
        )
        return step
