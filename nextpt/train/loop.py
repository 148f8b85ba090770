"""Training loop: for each step batches, an optimizer step, its events, and due actions.

Steps are counted in one way, from here to the loader, in checkpoints and in metrics: `step` is the
number of completed optimizer steps. The batches at index `step` are those that are trained on when
`step` steps are complete; the step that they make is step `step + 1` in events and checkpoints.
"""

from __future__ import annotations

from typing import NoReturn

from nextpt.base.collective import run_on_all_ranks_or_stop
from nextpt.checkpoint.format import Checkpoint
from nextpt.checkpoint.manager import CheckpointManager
from nextpt.data.batch import Batch
from nextpt.evaluate.metrics import DomainSums
from nextpt.objective import local_weight_sum
from nextpt.optim.schedules import learning_rate
from nextpt.train.batch_growth import BatchGrowth
from nextpt.train.checkpointing import TrainingCheckpoints
from nextpt.train.context import TrainingContext
from nextpt.train.rollback import Rollback
from nextpt.train.rollback_policy import RollbackPolicy
from nextpt.train.spike_detector import StepVerdict
from nextpt.train.step_logger import StepLogger, StepResult
from nextpt.train.stopping import save_and_stop
from nextpt.train.validation import Validator


class Trainer:
    """Runs the optimizer steps of one rank, from `step` to the last one.

    Args:
        context: Config, engine, data, group, events and job.
        manager: The checkpoints of the run folder.

    Attributes:
        step: Number of completed optimizer steps.
    """

    def __init__(self, context: TrainingContext, manager: CheckpointManager) -> None:
        self.context = context
        self.step = 0
        self.logger = StepLogger(context)
        self.validator = Validator(context)
        self.policy = RollbackPolicy(context.config.guard, context.engine.spike_detector)
        self.growth = BatchGrowth(context.config, context.loader, context.group, context.events)
        self.checkpoints = TrainingCheckpoints(
            context, manager, self.validator, self.policy, self.growth
        )
        self.rollback = Rollback(context, self.policy, self.checkpoints)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue after the step of a checkpoint, whose weights the engine has.

        Raises:
            CheckpointError: When its state is damaged.
        """
        self.checkpoints.restore(checkpoint)
        self.step = checkpoint.step

    def fit(self) -> None:
        """Train to the last step and save it. Collective.

        Raises:
            TrainingStopped: When a rank was asked to stop; the state was saved if time allowed.
            UserError: When data cannot be read, a save fails, or rollbacks lead no further.
        """
        self.logger.start_interval(self.step)
        while self.step < self.context.loader.last_step or self.policy.is_rollback_due():
            if self.policy.is_rollback_due():
                self.step = self.rollback.run()
                self.logger.start_interval(self.step)
                continue

            result = self.train_step(self.step, self.logger.is_due(self.step + 1))
            if result is None:
                self.stop()
            self.step = step = self.step + 1
            self.context.job.record_step(step)
            self.checkpoints.poll()

            log = self.logger.is_due(step)
            validate = self.validator.is_due(step)
            save = self.checkpoints.is_due(step)
            verdicts = self.read_verdicts() if log or validate or save else []
            if self.policy.is_rollback_due():
                continue
            if log:
                event = self.logger.log(step, result, verdicts[-1])
                if not verdicts[-1].reason:
                    self.growth.record(step, event.noise)
            if validate:
                if not self.validator.validate(step):
                    self.stop()
                self.logger.start_interval(step)
            # Among bad steps there is nothing new to save, and a rollback needs a checkpoint from
            # before them.
            is_last = step == self.context.loader.last_step
            if save and (is_last or not self.policy.consecutive):
                self.policy.reset_rollbacks()
                self.growth.decide(step)
                self.checkpoints.save(step, wait=is_last)
                self.logger.start_interval(step)

    def train_step(self, step: int, measure_noise: bool = False) -> StepResult | None:
        """Make one optimizer step without waiting for the device. Collective.

        Args:
            step: Number of completed steps, the index of the batches.
            measure_noise: Whether to measure the gradient noise of this step.

        Returns:
            None, and no step is made, when a rank was asked to stop.

        Raises:
            UserError: On every rank, when the batches of one cannot be read.
        """
        engine, loader, job = self.context.engine, self.context.loader, self.context.job
        job.set_phase("batches", step + 1)
        batches, stopping = run_on_all_ranks_or_stop(
            self.context.group, lambda: self._read_batches(step), lambda: job.stop_requested
        )
        if stopping:
            return None
        job.set_phase("training", step + 1)
        batches = [batch.to(engine.device) for batch in batches]
        weight_sum = engine.all_reduce(local_weight_sum(batches))
        if not self._is_comparable(step):
            engine.spike_detector.reset()
        lr = learning_rate(self.context.config, step + 1, loader.batches)
        losses = engine.step(batches, weight_sum, lr, measure_noise)
        sums = DomainSums(loader.domains, engine.device)
        for batch, loss in zip(batches, losses, strict=True):
            sums.add(loss.nats, batch.target_bytes, batch.is_text, batch.domain_ids)
        return StepResult(lr, sums, weight_sum, len(batches))

    def _is_comparable(self, step: int) -> bool:
        """Whether loss and gradient norm of a step can be compared with those before it.

        Not with another mixture or context, and not with a smaller batch, whose norm and scatter
        are larger. A larger batch has smaller ones: limits from before it are only too wide.
        """
        sizes = [self.context.loader.batches.batch_size(s) for s in (max(step - 1, 0), step)]
        return sizes[1] >= sizes[0] and not self.context.loader.begins_stage(step)

    def _read_batches(self, step: int) -> list[Batch]:
        self.context.job.check_lock()
        batches = self.context.loader.step_batches(step)
        self.context.job.set_phase("vote on batches", step + 1)
        return batches

    def read_verdicts(self) -> list[StepVerdict]:
        """Read how the steps since the last call were judged and publish skips. Collective.

        Raises:
            RuntimeError: When ranks disagree, because one of them computes wrongly.
        """
        self.context.job.set_phase("logging", self.step)
        verdicts, skips = self.policy.read_verdicts(self.step)
        counts = self.context.group.all_gather([self.policy.skipped, self.policy.consecutive])
        if any(count != counts[0] for count in counts):
            raise RuntimeError(
                f"the ranks judged steps up to {self.step} differently: [skipped in all, in a row]"
                f" is {counts}, by rank; their losses or gradients are no longer the same, so one"
                " of them computes wrongly"
            )
        for skip in skips:
            self.context.events.publish(skip)
        return verdicts

    def stop(self) -> NoReturn:
        """Save the completed steps if there is time, and end the job. Collective.

        Raises:
            TrainingStopped: Always.
        """
        self.read_verdicts()
        save_and_stop(self.step, self.context, self.checkpoints)
