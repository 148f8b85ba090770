"""Validation during training: loss on the validation split, by domain, over all ranks."""

from __future__ import annotations

import math
from typing import Any

from nextpt.base.collective import run_on_all_ranks_or_stop
from nextpt.checkpoint.state import average_kind
from nextpt.evaluate.metrics import DomainSums, metrics_json
from nextpt.events import ValidationEvent
from nextpt.train.context import TrainingContext
from nextpt.train.engine import TrainingModule


class Validator:
    """Computes the validation loss every `validation.every_steps` steps and after the last one.

    Attributes:
        latest: Step and loss (nats per token, None where it is not finite) of the last validation,
            None before the first. Checkpoints keep it.
    """

    def __init__(self, context: TrainingContext) -> None:
        self.context = context
        self.latest: dict[str, Any] | None = None

    @property
    def latest_loss(self) -> float | None:
        """Loss of the last validation, nats per token."""
        return self.latest["nats_per_token"] if self.latest else None

    def is_due(self, step: int) -> bool:
        """Whether to validate after `step` completed steps."""
        every = self.context.config.validation.every_steps
        return every is not None and (step % every == 0 or step == self.context.loader.last_step)

    def validate(self, step: int) -> bool:
        """Validate after `step` completed steps and publish a ValidationEvent. Collective.

        All ranks make the same number of forward passes, which ZeRO-3 needs.

        Returns:
            False when a rank was asked to stop before the end; no event is published then.
        """
        metrics = self._measure(step)
        if metrics is None:
            return False
        averages, state = {}, self.context.engine.state
        if self.context.config.validation.averages:
            for decay in state.begun_averages():
                with state.averaged_weights(decay):
                    average_metrics = self._measure(step)
                if average_metrics is None:
                    return False
                averages[average_kind(decay)] = average_metrics
        loss = metrics["total"]["nats_per_token"]
        self.latest = {"step": step, "nats_per_token": loss if math.isfinite(loss) else None}
        self.context.events.publish(
            ValidationEvent(
                step=step,
                tokens=self.context.loader.batches.consumed_tokens(step),
                domains=metrics["domains"],
                total=metrics["total"],
                averages=averages,
            )
        )
        return True

    def _measure(self, step: int) -> dict[str, Any] | None:
        """Metrics of the current weights; None when a rank was asked to stop. Collective."""
        engine, domains = self.context.engine, self.context.loader.domains
        sums = DomainSums(domains, engine.device)
        with engine.evaluating() as module:
            for domain in range(len(domains)):
                if not self._add_domain(domain, module, sums, step):
                    return None
        engine.all_reduce(sums.sums)
        return metrics_json(sums)

    def _add_domain(self, domain: int, module: TrainingModule, sums: DomainSums, step: int) -> bool:
        """Add the sums of one domain; False when a rank was asked to stop."""
        context, job = self.context, self.context.job
        batches = context.loader.validation_batches(domain, context.config.validation.sequences)
        while True:
            job.set_phase("validation", step)
            batch, stopping = run_on_all_ranks_or_stop(
                context.group, lambda: next(batches, None), lambda: job.stop_requested
            )
            if stopping:
                return False
            if batch is None:
                return True
            batch = batch.to(context.engine.device)
            nats = module(batch, 1.0).nats
            sums.add(nats, batch.target_bytes, batch.is_text, batch.domain_ids)
