"""Training metrics: the StepEvent of a logged step, with throughput since the last one."""

from __future__ import annotations

import time
from dataclasses import dataclass

from torch import Tensor

from nextpt.evaluate.metrics import DomainSums
from nextpt.events import StepEvent
from nextpt.model import ModelSpec, count
from nextpt.train.context import TrainingContext
from nextpt.train.hardware import memory_in_use, peak_flops
from nextpt.train.spike_detector import StepVerdict


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step leaves on the device, before anything of it is read.

    Attributes:
        lr: Learning rate of the step.
        sums: Nats, tokens and bytes by domain, of this rank's micro-batches.
        weight_sum: Sum of token weights over all ranks and micro-batches, fp32 scalar.
        micro_batches: Number of micro-batches of this rank.
    """

    lr: float
    sums: DomainSums
    weight_sum: Tensor
    micro_batches: int


class StepLogger:
    """Publishes a StepEvent every `train.log_every` steps and after the last one.

    This is the only place that reads a step's metrics from the device. Rates are those of the
    steps since `start_interval`, so that validation and saving do not count as training time.
    """

    def __init__(self, context: TrainingContext) -> None:
        self.context = context
        config, engine = context.config, context.engine
        counts = count(ModelSpec.from_config(config), config.data.sequence_length)
        self.flops_per_token = counts.training_flops_per_token
        self.peak_flops = peak_flops(config, engine.device)
        self.start_interval(0)

    def is_due(self, step: int) -> bool:
        """Whether to log after `step` completed steps."""
        every = self.context.config.train.log_every
        return step % every == 0 or step == self.context.loader.last_step

    def start_interval(self, step: int) -> None:
        """Measure rates from now on; `step` steps are complete."""
        self._start_time = time.monotonic()
        self._start_step = step
        self._start_wait = self.context.loader.wait_seconds

    def log(self, step: int, result: StepResult, verdict: StepVerdict) -> StepEvent:
        """Publish and return the event of the step that completed `step` steps. Collective.

        Sums over ranks and waits for the device. A skipped step is logged with its own loss.
        """
        engine, batches = self.context.engine, self.context.loader.batches
        tokens = batches.consumed_tokens(step)
        sums = result.sums
        engine.all_reduce(sums.sums)
        seconds = max(time.monotonic() - self._start_time, 1e-9)
        first = min(self._start_step, step - 1)
        rate = (tokens - batches.consumed_tokens(first)) / seconds
        mfu = None
        if self.peak_flops:
            mfu = rate * self.flops_per_token / (self.peak_flops * engine.world_size)
        event = StepEvent(
            step=step,
            tokens=tokens,
            batch_size=batches.batch_size(step - 1),
            loss=verdict.loss,
            bpb=sums.total().bpb,
            lr=result.lr,
            grad_norm=verdict.grad_norm,
            tokens_per_second=rate,
            z_loss=verdict.z_loss,
            auxiliary_losses=engine.auxiliary_losses(),
            data_wait_seconds=self.context.loader.wait_seconds - self._start_wait,
            memory_bytes=memory_in_use(engine.device),
            mfu=mfu,
            noise=engine.gradient_noise(result.micro_batches, result.weight_sum, verdict.grad_norm),
            update_ratios=engine.update_ratios(),
            domains={
                name: {"nats_per_token": metrics.nats_per_token, "bpb": metrics.bpb}
                for name, metrics in sums.by_domain().items()
            },
        )
        self.context.events.publish(event)
        self.start_interval(step)
        return event
