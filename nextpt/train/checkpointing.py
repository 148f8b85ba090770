"""Checkpoints of a training run: when to save, what to save, and the outcome of saves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nextpt.base.collective import RankGroup, run_on_all_ranks
from nextpt.base.errors import CheckpointError, same_on_all_ranks
from nextpt.checkpoint.folders import step_of
from nextpt.checkpoint.format import Checkpoint
from nextpt.checkpoint.manager import CheckpointManager, FailedSave, SavedCheckpoint
from nextpt.checkpoint.state import AVERAGE
from nextpt.events import CheckpointEvent, SaveFailedEvent
from nextpt.job.environment import versions
from nextpt.train.batch_growth import BatchGrowth
from nextpt.train.context import TrainingContext
from nextpt.train.engine import Engine
from nextpt.train.random_states import get_rng_state, set_rng_state
from nextpt.train.rollback_policy import RollbackPolicy
from nextpt.train.validation import Validator


class TrainingCheckpoints:
    """Saves and restores everything that a run is resumed from.

    A checkpoint holds weights, optimizer state, random states, the position in the data, the last
    validation and the state of the spike detector, the rollback policy and the batch growth. All
    methods are collective.

    Attributes:
        saved_step: Step of the last checkpoint that is durable or being written.
        durable_step: Step of the last durable checkpoint; lags behind during a background save.
        save_seconds: Duration of the last save, None before the first of this job.
    """

    def __init__(
        self,
        context: TrainingContext,
        manager: CheckpointManager,
        validator: Validator,
        policy: RollbackPolicy,
        growth: BatchGrowth,
    ) -> None:
        self.context = context
        self.manager = manager
        self.validator = validator
        self.policy = policy
        self.growth = growth
        self.saved_step = self.durable_step = 0
        self.save_seconds: float | None = None
        self._last_save_time = time.monotonic()
        self._overdue = False

    def is_due(self, step: int) -> bool:
        """Whether to save after `step` completed steps; stays true until a save begins.

        A save is due after the last step, every `checkpoint.every_steps` steps, and every
        `checkpoint.every_minutes` minutes by rank 0's clock (checked at logging steps only).
        """
        is_last = step == self.context.loader.last_step
        self._overdue = self._overdue or is_last or self._is_scheduled(step)
        return self._overdue

    def _is_scheduled(self, step: int) -> bool:
        config, engine = self.context.config, self.context.engine
        settings = config.checkpoint
        if settings.every_steps and step % settings.every_steps == 0:
            return True
        if not settings.every_minutes or step % config.train.log_every:
            return False
        late = time.monotonic() - self._last_save_time >= 60 * settings.every_minutes
        flag = torch.tensor(float(late and engine.rank == 0), device=engine.device)
        return bool(engine.all_reduce(flag).item())

    def save(self, step: int, wait: bool) -> None:
        """Save the state after `step` completed steps.

        Args:
            step: Number of completed steps.
            wait: Whether to return only when the checkpoint is durable.

        Raises:
            CheckpointSaveError: When training must not go on without this checkpoint.
            RunInUseError: When another job took the run folder.
        """
        self.context.job.set_phase("save", step)
        self.saved_step, self._overdue = step, False
        extras = self._extras(step)
        with self._lost_lock_first():
            outcomes = self.manager.save(
                self.context.engine.state, extras, get_rng_state(), self.validator.latest_loss, wait
            )
        self._report(outcomes)
        self._last_save_time = time.monotonic()

    def poll(self, wait: bool = False) -> None:
        """Report a background save that has ended, and news of the mirror.

        Args:
            wait: Whether to wait for a save that is still being written.
        """
        with self._lost_lock_first():
            outcomes = self.manager.poll(wait)
        self._report(outcomes)
        if self.manager.mirror:
            for event in self.manager.mirror.drain_events():
                self.context.events.publish(event)

    def rollback(self, step: int) -> dict[str, Any] | None:
        """Restore engine and random states from the newest checkpoint before `step`.

        Returns:
            The state of that checkpoint, None when there is none. The caller restores the rest.
        """
        checkpoint = self.manager.rollback(step)
        if checkpoint is None:
            return None
        restore_engine(self.context.engine, checkpoint, self.context.group)
        self.saved_step = self.durable_step = checkpoint.step
        self.validator.latest = checkpoint.state.get("validation")
        self.growth.load_state(checkpoint.state.get("batch_growth"))
        return checkpoint.state

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore everything but the engine (see `restore_engine`) when a job resumes.

        Raises:
            CheckpointError: When the state of the guard or the data is damaged.
        """
        state = checkpoint.state
        self.saved_step = self.durable_step = checkpoint.step
        try:
            self.validator.latest = state.get("validation")
            self.policy.load_state(state.get("guard"))
            self.growth.load_state(state.get("batch_growth"))
            self.context.loader.load_state(state["data"])
        except (KeyError, TypeError, ValueError) as error:
            raise same_on_all_ranks(
                CheckpointError(
                    f"checkpoint {checkpoint.folder}: the state of the guard or of the data is"
                    f" damaged: {error}; resume from another one with checkpoint.resume=STEP"
                )
            ) from error

    def _extras(self, step: int) -> dict[str, Any]:
        """The part of state.json that is the trainer's. Waits for the device."""
        config = self.context.config
        return {
            "step": step,
            "tokens": self.context.loader.batches.consumed_tokens(step),
            "config": config.model_dump(mode="json"),
            "data": self.context.loader.state(step),
            "versions": versions(),
            "validation": self.validator.latest,
            "guard": self.policy.state(),
            "batch_growth": self.growth.state(),
            "start": self.context.job.start,
        }

    @contextmanager
    def _lost_lock_first(self) -> Iterator[None]:
        """Report a lost run folder in the place of the failed save that it causes."""
        try:
            yield
        except CheckpointError:
            run_on_all_ranks(self.context.group, self.context.job.check_lock)
            raise

    def _report(self, outcomes: list[SavedCheckpoint | FailedSave]) -> None:
        """Publish the outcomes of saves and keep track of the last saved step."""
        for outcome in outcomes:
            if isinstance(outcome, SavedCheckpoint):
                folder = outcome.checkpoint.folder
                self.save_seconds, self.durable_step = outcome.seconds, step_of(folder)
                self.context.events.publish(
                    CheckpointEvent(
                        step=self.durable_step,
                        path=str(folder),
                        seconds=outcome.seconds,
                        bytes=outcome.checkpoint.bytes,
                        stall_seconds=outcome.stall_seconds,
                    )
                )
                continue
            run_on_all_ranks(self.context.group, self.context.job.check_lock)
            self._raise_unless_tolerated(outcome)
            error = outcome.error
            self.context.events.publish(
                SaveFailedEvent(
                    step=outcome.step,
                    message=str(error),
                    rank=error.rank,
                    errno=error.number,
                    consecutive=outcome.consecutive,
                )
            )
            if outcome.step == self.saved_step:
                self.saved_step = self.durable_step

    def _raise_unless_tolerated(self, failed: FailedSave) -> None:
        """Raise the error of a failed save where training must not go on without it."""
        config = self.context.config
        settings = config.checkpoint
        if (
            settings.on_failure == "stop"
            or failed.consecutive >= settings.max_failures
            or failed.step == self.context.loader.last_step
        ):
            raise failed.error


def restore_engine(engine: Engine, checkpoint: Checkpoint, group: RankGroup) -> None:
    """Restore weights, optimizer state and random states from a checkpoint. Collective.

    Raises:
        CheckpointError: When the checkpoint is of another model or damaged.
    """
    checkpoint.check_state(engine.state.state_shapes())
    stored, expected = (
        {name for name in scalars if not name.startswith(AVERAGE)}
        for scalars in (checkpoint.state["scalars"], engine.state.scalars())
    )
    if stored != expected:
        raise CheckpointError(
            f"checkpoint {checkpoint.folder} has the scalars {sorted(stored)}, expected"
            f" {sorted(expected)}; it was not written by this nextpt"
        )
    engine.state.load(checkpoint, checkpoint.state["scalars"])
    checkpoint.close()
    try:
        if states := checkpoint.rng(group.rank):
            set_rng_state(states)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint.folder}: the random states of rank {group.rank} cannot be"
            f" used: {error}"
        ) from error
