"""Trainers without a job around them: no lock, no watchdog, no subscribers of events."""

from __future__ import annotations

from nextpt.base.collective import RankGroup
from nextpt.checkpoint.manager import CheckpointManager
from nextpt.config import Config
from nextpt.data.loader import Loader
from nextpt.events import EventBus
from nextpt.job.context import JobContext
from nextpt.train.context import TrainingContext
from nextpt.train.engine import Engine
from nextpt.train.loop import Trainer


def bare_trainer(config: Config, engine: Engine, loader: Loader) -> Trainer:
    group = RankGroup.world()
    checkpoints = CheckpointManager(config.run_dir, config.checkpoint, group, print)
    context = TrainingContext(config, engine, loader, group, EventBus(), JobContext())
    return Trainer(context, checkpoints)
