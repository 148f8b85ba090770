"""The training loop: batches in, events out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nextpt.base.collective import RankGroup, run_on_all_ranks_or_stop
from nextpt.base.errors import TrainingStopped, UserError
from nextpt.checkpoint.folders import step_of
from nextpt.checkpoint.manager import FailedSave, SavedCheckpoint
from nextpt.config import Config
from nextpt.data.batch import Batch
from nextpt.data.loader import Loader
from nextpt.evaluate.metrics import DomainSums, metrics_json
from nextpt.events import Event, RollbackEvent, StepEvent, ValidationEvent
from nextpt.job.context import JobContext
from nextpt.job.signals import resume_command
from nextpt.model import ModelSpec, count
from nextpt.objective import local_weight_sum
from nextpt.optim.schedules import learning_rate
from nextpt.train.engine import Engine
from nextpt.train.hardware import memory_in_use, peak_flops
from nextpt.train.rollback import EMPTY_STATE, RollbackPolicy
from nextpt.train.spike_detector import StepVerdict

Outcomes = list[SavedCheckpoint | FailedSave]


@dataclass
class Clock:
    """Where an interval of steps began: wall time, last step before it, seconds waited for data so far."""

    started: float
    step: int
    waited: float


@dataclass(frozen=True)
class Made:
    """A step that was made. sums: of this rank. weights: of all. micro_batches: of this rank."""

    sums: DomainSums
    weights: torch.Tensor
    micro_batches: int


class Trainer:
    """Runs optimizer steps first_step..config.last_step of one rank.

    save: begins a checkpoint of the given step with what `state` gives; the last argument asks it
    to wait until that is durable. poll: called after every step, tells what became of it; its
    argument asks it to wait. Both are collective, and return what became durable, and what failed
    where training may go on without it. emit: hears events (rank 0 only does something with them;
    computing them is collective). life: hears what is being done, and says when to end. go_back:
    puts the engine where the newest checkpoint from before a step has it, and returns the state of
    that; None when there is none; collective.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        loader: Loader,
        ranks: RankGroup,
        save: Callable[[int, dict[str, Any], bool], Outcomes],
        poll: Callable[[bool], Outcomes],
        emit: Callable[[Event], None],
        job: JobContext | None = None,
        go_back: Callable[[int], dict[str, Any] | None] = lambda step: None,
    ) -> None:
        self.config = config
        self.engine = engine
        self.loader = loader
        self.ranks = ranks
        self.domains = loader.domains
        self.save = save
        self.poll = poll
        self.emit = emit
        self.job = job or JobContext()
        self.go_back = go_back
        self.guard, self.validation = RollbackPolicy(config.guard, engine.spike_detector), None
        self.flops_per_token = count(
            ModelSpec.from_config(config),
            config.data.sequence_length,
        ).training_flops_per_token
        self.peak = peak_flops(config, engine.device)
        self.last_saved_at = time.monotonic()
        # Of the last checkpoint; None: none was made since the start
        self.saved_step, self.save_seconds = 0, None
        self.durable_step = 0  # lags behind saved_step while a save is under way
        self.save_owed = False

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the trainer: the last validation, and the guard.

        Waits for the device.
        """
        return {"validation": self.validation, "guard": self.guard.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state; one of an older nextpt has no guard.

        Raises KeyError, TypeError or ValueError.
        """
        self.validation = state.get("validation")
        self.guard.load(state.get("guard", EMPTY_STATE))

    def run(self, first_step: int) -> None:
        """Train, then save the last step. first_step: 1 for a fresh run.

        Raises TrainingStopped when a rank was told to stop, and UserError when the guard gives up.
        """
        config, last, step = self.config, self.config.last_step, first_step - 1
        self.saved_step = self.durable_step = step
        clock = self._clock(step)
        while step < last or self.guard.tripped:
            if self.guard.tripped:
                step = self.roll_back()
                clock = self._clock(step)
                continue
            step += 1
            logging = step % config.train.log_every == 0 or step == last
            made = self.train_step(step, logging)
            if made is None:
                self.end_early(step - 1)
            self.job.record_step(step)
            self.look(wait=False)
            every = config.validation.every_steps
            validating = every is not None and (step % every == 0 or step == last)
            self.save_owed |= step == last or self.save_is_due(step)
            judged = self.judged(step) if logging or validating or self.save_owed else []
            if self.guard.tripped:
                continue
            if logging:
                self.log(step, made, judged[-1], clock)
                clock = self._clock(step)
            if validating:
                if not self.validate(step):
                    self.end_early(step)
                clock = self._clock(step)
            # In a run of bad steps there is nothing new to save, and a rollback needs one from
            # before it.
            if self.save_owed and (step == last or not self.guard.in_row):
                self.guard.reset_rollbacks()
                self.save_now(step, wait=step == last)
                clock = self._clock(step)

    def judged(self, step: int) -> list[StepVerdict]:
        """Read how the steps up to `step` since the last call were judged, and tell of those that were skipped. Collective."""
        self.job.set_phase("logging", step)
        judged, skipped = self.guard.hear(step)
        told = self.ranks.all_gather([self.guard.skipped, self.guard.in_row])
        if any(one != told[0] for one in told):
            raise RuntimeError(
                f"the ranks judged steps up to {step} differently: [skipped in all, in a row] is"
                f" {told}, by rank; their losses or gradients are no longer the same, so one of"
                " them computes wrongly"
            )
        for event in skipped:
            self.emit(event)
        return judged

    def roll_back(self) -> int:
        """Go back to the newest checkpoint from before the bad steps, pass over their data, and save that at once, so that the next start takes it; returns its step. Collective. Raises UserError when the guard gives up."""
        guard, first, last = self.guard, self.guard.since, self.guard.since + self.guard.in_row - 1
        self.job.set_phase("rolling back", last)
        self.look(wait=True)
        # The loader counts steps from 0: that after the last bad one
        seen, stop = guard.seen(), self.loader.position(last)
        state = self.go_back(first)
        if state is None:
            raise UserError(
                f"{seen}, and there is no checkpoint from before them to go back to; look at the"
                " data and the learning rate, save more often (checkpoint.every_steps), or give"
                " guard.rollback_after or guard.spike_sigma a larger value"
            )
        step, most = state["step"], self.config.guard.max_rollbacks
        guard.record_rollback(state.get("guard", EMPTY_STATE))
        if guard.rollbacks > most:
            raise UserError(
                f"{seen}, after {most} rollbacks to step {step} (guard.max_rollbacks); look at the"
                " data, at metrics.jsonl and at the learning rate, go further back with"
                " checkpoint.resume=STEP, or give guard.spike_sigma a larger value"
            )
        self.loader.load_state(state["data"])
        begin = self.loader.position(step)
        self.loader.skip_data(step, stop)
        self.validation = state.get("validation")
        self.durable_step = step
        self.save_now(step, wait=True)
        self.emit(RollbackEvent(step, first, last, guard.reason, begin, stop, guard.rollbacks))
        return step

    def _clock(self, step: int) -> Clock:
        return Clock(time.monotonic(), step, self.loader.wait_seconds)

    def save_now(self, step: int, wait: bool) -> None:
        self.job.set_phase("save", step)
        self.saved_step, self.save_owed = step, False
        self._took(self.save(step, self.state(), wait))
        self.last_saved_at = time.monotonic()

    def look(self, wait: bool) -> None:
        """See what became of the save under way."""
        self._took(self.poll(wait))

    def _took(self, outcomes: Outcomes) -> None:
        for one in outcomes:
            if isinstance(one, SavedCheckpoint):
                self.save_seconds, self.durable_step = one.seconds, step_of(one.checkpoint.folder)
            elif one.step == self.saved_step:
                self.saved_step = self.durable_step

    def end_early(self, step: int) -> None:
        """Save `step`, the last that was made, where that fits into the time that is left, and raise TrainingStopped. Collective."""
        self.judged(step)
        grace = self.config.checkpoint.grace_seconds
        told = self.ranks.all_gather(
            [self.job.stop.name, self.job.stop.seconds_left(grace), self.save_seconds]
        )
        name = next(name for name, _, _ in told if name)
        left = min(seconds for _, seconds, _ in told if seconds is not None)
        measured = [seconds for _, _, seconds in told if seconds is not None]
        why = "the save failed"
        if step > self.saved_step and measured and max(measured) > left:
            why = (
                f"the last save took {max(measured):.1f} s and {max(left, 0.0):.1f} s of"
                f" checkpoint.grace_seconds = {grace:g} were left"
            )
        elif step > self.saved_step:
            self.save_now(step, wait=True)
        self.job.set_phase("save", step)
        self.look(wait=True)
        text = "saved" if step else "nothing to save yet"
        if step > self.saved_step:
            text = f"not saved, for {why}; the checkpoint of step {self.saved_step} is kept"
        raise TrainingStopped(
            f"stopped by {name} after step {step} ({text}); this resumes: {resume_command()}"
        )

    def train_step(self, step: int, measure: bool = False) -> Made | None:
        """One optimizer step; nothing here waits for the device.

        None, and no step, when a rank was told to stop.

        measure: also the noise of its gradient.

        Raises UserError on every rank when the batches of one cannot be read.
        """
        self.job.set_phase("batches", step)
        read, stopping = run_on_all_ranks_or_stop(
            self.ranks, lambda: self._read(step), self.job.stop_requested
        )
        if stopping:
            return None
        self.job.set_phase("training", step)
        batches = [batch.to(self.engine.device) for batch in read]
        weights = self.engine.all_reduce(local_weight_sum(batches))
        # Of another mixture or context: its losses are not those of the last steps
        if self.loader.begins_stage(step - 1):
            self.engine.spike_detector.reset()
        losses = self.engine.step(batches, weights, learning_rate(self.config, step), measure)
        sums = DomainSums(self.domains, self.engine.device)
        for batch, loss in zip(batches, losses, strict=True):
            sums.add(loss.nats, batch.target_bytes, batch.is_text, batch.domain_ids)
        return Made(sums, weights, len(batches))

    def _read(self, step: int) -> list[Batch]:
        self.job.check()
        batches = self.loader.step_batches(step - 1)
        self.job.set_phase("the vote on batches", step)
        return batches

    def log(self, step: int, made: Made, judged: StepVerdict, clock: Clock) -> None:
        """Sum over ranks, read the device, emit the step's event.

        A step that was skipped is logged as it was.
        """
        sums = made.sums
        self.engine.all_reduce(sums.sums)
        now, steps = time.monotonic(), max(step - clock.step, 1)
        rate = steps * self.config.tokens_per_step / max(now - clock.started, 1e-9)
        self.emit(
            StepEvent(
                step=step,
                tokens=step * self.config.tokens_per_step,
                loss=judged.loss,
                bpb=sums.total().bpb,
                lr=learning_rate(self.config, step),
                grad_norm=judged.grad_norm,
                tokens_per_second=rate,
                z_loss=judged.z_loss,
                data_wait_seconds=self.loader.wait_seconds - clock.waited,
                memory_bytes=memory_in_use(self.engine.device),
                mfu=(
                    rate * self.flops_per_token / (self.peak * self.engine.world_size)
                    if self.peak
                    else None
                ),
                noise=self.engine.gradient_noise(
                    made.micro_batches, made.weights, judged.grad_norm
                ),
                update_ratios=self.engine.update_ratios(),
                domains={
                    name: {"nats_per_token": f.nats_per_token, "bpb": f.bpb}
                    for name, f in sums.figures().items()
                },
            )
        )

    def validate(self, step: int) -> bool:
        """Loss on the held-out rows of every domain.

        The same number of forward passes on every rank.

        False, and no event, when a rank was told to stop.
        """
        sums = DomainSums(self.domains, self.engine.device)
        config = self.config
        with self.engine.evaluating() as module:
            for domain in range(len(self.domains)):
                batches = self.loader.validation_batches(domain, config.validation.sequences)
                while True:
                    self.job.set_phase("validation", step)
                    batch, stopping = run_on_all_ranks_or_stop(
                        self.ranks, lambda: next(batches, None), self.job.stop_requested
                    )
                    if stopping:
                        return False
                    if batch is None:
                        break
                    batch = batch.to(self.engine.device)
                    sums.add(
                        module(batch, 1.0).nats, batch.target_bytes, batch.is_text, batch.domain_ids
                    )
        self.engine.all_reduce(sums.sums)
        figures = metrics_json(sums)
        nats = figures["total"]["nats_per_token"]
        self.validation = {"step": step, "nats_per_token": nats if math.isfinite(nats) else None}
        self.emit(ValidationEvent(step, step * config.tokens_per_step, **figures))
        return True

    def save_is_due(self, step: int) -> bool:
        """Every N steps, or every M minutes as rank 0's clock has it (looked at at logging steps only)."""
        every = self.config.checkpoint
        if every.every_steps and step % every.every_steps == 0:
            return True
        if not every.every_minutes or step % self.config.train.log_every:
            return False
        late = time.monotonic() - self.last_saved_at >= 60 * every.every_minutes
        flag = torch.tensor(float(late and self.engine.rank == 0), device=self.engine.device)
        return bool(self.engine.all_reduce(flag).item())
