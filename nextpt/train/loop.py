"""The training loop: batches in, events out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nextpt.checkpoint.ranks import Ranks
from nextpt.config import Config
from nextpt.data.loader import Loader
from nextpt.evaluate.metrics import DomainSums, figures_json
from nextpt.events import Event, StepEvent, ValidationEvent
from nextpt.model import count
from nextpt.objective import Loss, local_weight_sum
from nextpt.train.engine import Engine
from nextpt.train.hardware import memory_in_use, peak_flops
from nextpt.train.schedule import learning_rate
from nextpt.train.together import on_all


@dataclass
class Clock:
    """Where an interval of steps began: wall time, last step before it, seconds waited for data so far."""

    started: float
    step: int
    waited: float


class Trainer:
    """Runs optimizer steps first_step..config.last_step of one rank.

    save: begins a checkpoint of the given step with the last validation before it; the last argument asks it to wait
    until that is durable. poll: called after every step, tells what became of it. Both are collective. emit: hears
    events (rank 0 only does something with them; computing them is collective). validation: the last one before this
    start, as `validate` keeps it.
    """

    def __init__(self, config: Config, engine: Engine, loader: Loader, ranks: Ranks,
                 save: Callable[[int, dict[str, Any] | None, bool], None], poll: Callable[[], None],
                 emit: Callable[[Event], None], validation: dict[str, Any] | None = None) -> None:
        self.config, self.engine, self.loader, self.ranks, self.domains = config, engine, loader, ranks, loader.domains
        self.save, self.poll, self.emit, self.validation = save, poll, emit, validation
        self.flops_per_token = count(config).training_flops_per_token
        self.peak = peak_flops(config, engine.device)
        self.last_saved_at = time.monotonic()

    def run(self, first_step: int) -> None:
        """Train, then save the last step. first_step: 1 for a fresh run."""
        config, last = self.config, self.config.last_step
        clock = self._clock(first_step - 1)
        for step in range(first_step, last + 1):
            sums, losses = self.train_step(step)
            self.poll()
            if step % config.train.log_every == 0 or step == last:
                self.log(step, sums, losses, clock)
                clock = self._clock(step)
            if config.validation.every_steps and (step % config.validation.every_steps == 0 or step == last):
                self.validate(step)
                clock = self._clock(step)
            if step == last or self.save_is_due(step):
                self.save(step, self.validation, step == last)
                self.last_saved_at = time.monotonic()
                clock = self._clock(step)

    def _clock(self, step: int) -> Clock:
        return Clock(time.monotonic(), step, self.loader.wait_seconds)

    def train_step(self, step: int) -> tuple[DomainSums, list[Loss]]:
        """One optimizer step; nothing here waits for the device.

        Raises UserError on every rank when the batches of one cannot be read.
        """
        read = on_all(self.ranks, lambda: self.loader.step_batches(step - 1))
        batches = [batch.to(self.engine.device) for batch in read]
        weights = self.engine.all_sum(local_weight_sum(batches))
        losses = self.engine.step(batches, weights, learning_rate(self.config, step))
        sums = DomainSums(self.domains, self.engine.device)
        for batch, loss in zip(batches, losses, strict=True):
            sums.add(loss.nats, batch.target_bytes, batch.is_text, batch.domain_ids)
        return sums, losses

    def log(self, step: int, sums: DomainSums, losses: list[Loss], clock: Clock) -> None:
        """Sum over ranks, read the device, emit the step's event."""
        parts = torch.stack([torch.stack([loss.total.double(), loss.z_part.double()]) for loss in losses]).sum(dim=0)
        total, z_part = self.engine.all_sum(parts).tolist()
        self.engine.all_sum(sums.sums)
        now, steps = time.monotonic(), max(step - clock.step, 1)
        rate = steps * self.config.tokens_per_step / max(now - clock.started, 1e-9)
        self.emit(StepEvent(
            step=step,
            tokens=step * self.config.tokens_per_step,
            loss=total - z_part,
            bpb=sums.total().bpb_text,
            lr=learning_rate(self.config, step),
            grad_norm=self.engine.grad_norm(),
            tokens_per_second=rate,
            z_loss=z_part,
            data_wait_seconds=self.loader.wait_seconds - clock.waited,
            memory_bytes=memory_in_use(self.engine.device),
            mfu=rate * self.flops_per_token / (self.peak * self.engine.world_size) if self.peak else None,
            domains={name: {"nats_per_token": f.nats_per_token, "bpb": f.bpb_text} for name, f in sums.figures().items()},
        ))

    def validate(self, step: int) -> None:
        """Loss on the held-out rows of every domain; the same number of forward passes on every rank."""
        sums = DomainSums(self.domains, self.engine.device)
        config = self.config
        with self.engine.evaluating() as module:
            for domain in range(len(self.domains)):
                batches = self.loader.validation_batches(domain, config.validation.rows)
                while (batch := on_all(self.ranks, lambda: next(batches, None))) is not None:
                    batch = batch.to(self.engine.device)
                    sums.add(module(batch, 1.0).nats, batch.target_bytes, batch.is_text, batch.domain_ids)
        self.engine.all_sum(sums.sums)
        figures = figures_json(sums)
        nats = figures["total"]["nats_per_token"]
        self.validation = {"step": step, "nats_per_token": nats if math.isfinite(nats) else None}
        self.emit(ValidationEvent(step, step * config.tokens_per_step, **figures))

    def save_is_due(self, step: int) -> bool:
        """Every N steps, or every M minutes as rank 0's clock has it (looked at at logging steps only)."""
        every = self.config.checkpoint
        if every.every_steps and step % every.every_steps == 0:
            return True
        if not every.every_minutes or step % self.config.train.log_every:
            return False
        late = time.monotonic() - self.last_saved_at >= 60 * every.every_minutes
        flag = torch.tensor(float(late and self.engine.rank == 0), device=self.engine.device)
        return bool(self.engine.all_sum(flag).item())
