"""Context of training on one rank: the config, engine, data, group, events and job of its parts."""

from __future__ import annotations

from dataclasses import dataclass

from nextpt.base.collective import RankGroup
from nextpt.config import Config
from nextpt.data.loader import Loader
from nextpt.events import EventBus
from nextpt.job.context import JobContext
from nextpt.train.engine import Engine


@dataclass(frozen=True)
class TrainingContext:
    """What the loop, its validation, its checkpoints, its log and its rollbacks work with.

    Attributes:
        config: The run.
        engine: Model and optimizer.
        loader: Batches of this rank.
        group: All ranks of the job.
        events: Where losses, saves and rollbacks are published, on every rank.
        job: Run-folder lock, signals and watchdog of this rank.
    """

    config: Config
    engine: Engine
    loader: Loader
    group: RankGroup
    events: EventBus
    job: JobContext
