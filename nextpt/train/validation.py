"""Validation during training: loss on the validation split, by domain, over all ranks."""

from __future__ import annotations

import math
from typing import Any

from nextpt.base.collective import RankGroup, run_on_all_ranks_or_stop
from nextpt.config import Config
from nextpt.data.loader import Loader
from nextpt.evaluate.metrics import DomainSums, metrics_json
from nextpt.events import EventBus, ValidationEvent
from nextpt.job.context import JobContext
from nextpt.train.engine import Engine, TrainingModule


class Validator:
    """Computes the validation loss every `validation.every_steps` steps and after the last one.

    Attributes:
        latest: Step and loss (nats per token, None where it is not finite) of the last validation,
            None before the first. Checkpoints keep it.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        loader: Loader,
        ranks: RankGroup,
        events: EventBus,
        job: JobContext,
    ) -> None:
        self.config = config
        self.engine = engine
        self.loader = loader
        self.ranks = ranks
        self.events = events
        self.job = job
        self.latest: dict[str, Any] | None = None

    @property
    def latest_loss(self) -> float | None:
        """Loss of the last validation, nats per token."""
        return self.latest["nats_per_token"] if self.latest else None

    def is_due(self, step: int) -> bool:
        """Whether to validate after `step` completed steps."""
        every = self.config.validation.every_steps
        return every is not None and (step % every == 0 or step == self.config.last_step)

    def validate(self, step: int) -> bool:
        """Validate after `step` completed steps and publish a ValidationEvent. Collective.

        All ranks make the same number of forward passes, which ZeRO-3 needs.

        Returns:
            False when a rank was asked to stop before the end; no event is published then.
        """
        sums = DomainSums(self.loader.domains, self.engine.device)
        with self.engine.evaluating() as module:
            for domain in range(len(self.loader.domains)):
                if not self._add_domain(domain, module, sums, step):
                    return False
        self.engine.all_reduce(sums.sums)
        metrics = metrics_json(sums)
        loss = metrics["total"]["nats_per_token"]
        self.latest = {"step": step, "nats_per_token": loss if math.isfinite(loss) else None}
        self.events.publish(
            ValidationEvent(
                step=step,
                tokens=step * self.config.tokens_per_step,
                domains=metrics["domains"],
                total=metrics["total"],
            )
        )
        return True

    def _add_domain(self, domain: int, module: TrainingModule, sums: DomainSums, step: int) -> bool:
        """Add the sums of one domain; False when a rank was asked to stop."""
        batches = self.loader.validation_batches(domain, self.config.validation.sequences)
        while True:
            self.job.set_phase("validation", step)
            batch, stopping = run_on_all_ranks_or_stop(
                self.ranks, lambda: next(batches, None), lambda: self.job.stop_requested
            )
            if stopping:
                return False
            if batch is None:
                return True
            batch = batch.to(self.engine.device)
            nats = module(batch, 1.0).nats
            sums.add(nats, batch.target_bytes, batch.is_text, batch.domain_ids)
