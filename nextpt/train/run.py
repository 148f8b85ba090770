"""One training job on one rank: build, resume, fit."""

from __future__ import annotations

import platform
import random
import time
from collections.abc import Callable
from typing import Any

import torch

from nextpt.base.collective import (
    RankGroup,
    check_same_on_all_ranks,
    run_on_all_ranks,
    run_on_rank_0,
)
from nextpt.checkpoint.format import Checkpoint
from nextpt.checkpoint.manager import CheckpointManager
from nextpt.config import Config, flatten
from nextpt.data.loader import Loader
from nextpt.events import EventBus, Listener, MetricsFile
from nextpt.job.context import JobContext, job_context
from nextpt.job.environment import describe_start, host_and_device, read_starts, versions
from nextpt.train import kernel_choice
from nextpt.train.checkpointing import restore_engine
from nextpt.train.console import ConsoleListener, print_on_rank_0
from nextpt.train.context import TrainingContext
from nextpt.train.decay_start import open_decay_start
from nextpt.train.engine import Engine
from nextpt.train.initial_weights import load_initial_weights, open_initial_weights
from nextpt.train.loop import Trainer
from nextpt.train.mirroring import mirroring, open_mirror
from nextpt.train.process_group import start_distributed
from nextpt.train.run_folder import check_data, check_run_folder, open_run_folder
from nextpt.train.startup_checks import check_causality, check_cross_entropy, check_hpz

OpenTrackers = Callable[[Config, int], list[Listener]]


def run_training(
    config: Config, open_trackers: OpenTrackers = lambda config, first_step: []
) -> None:
    """Train the run that `config` describes; resume it when its folder holds checkpoints.

    Collective: every rank calls it.

    Args:
        config: The run.
        open_trackers: Called as open_trackers(config, first_step) on rank 0; returns listeners to
            events beside the console and metrics.jsonl.

    Raises:
        UserError: Whatever the user can fix, if possible before anything is written; RunInUseError
            while another job works in the run folder.
        TrainingStopped: When the job was asked to stop and did.
    """
    device = start_distributed()
    group = RankGroup.world()
    check_same_on_all_ranks(
        group, flatten({"config": config.model_dump(mode="json"), "versions": versions()})
    )
    config.accumulation_steps(group.world_size)
    check_hpz(config, [host for host, _ in group.all_gather(host_and_device(device))])
    with job_context(config.run_dir, group, config.train.hang_seconds) as job:
        _run_job(config, device, group, job, open_trackers)


def _run_job(
    config: Config,
    device: torch.device,
    group: RankGroup,
    job: JobContext,
    open_trackers: OpenTrackers,
) -> None:
    """Build, resume and fit, while this job holds the run folder."""
    job_start = _start_on_this_machine(group)
    loader = run_on_all_ranks(
        group,
        lambda: Loader(
            config,
            group.rank,
            group.world_size,
            pin=device.type == "cuda",
            job_start=job_start,
        ),
    )
    config = loader.config
    check_same_on_all_ranks(group, flatten({"dataset": loader.state(0)}))
    checkpoints = _open_checkpoints(config, group, job)
    run_on_rank_0(group, lambda: check_run_folder(config))
    checkpoint = checkpoints.resume()
    if checkpoint:
        job.record_step(checkpoint.step)
        check_data(config, checkpoint, loader)
        batches = loader.batches_of(checkpoint.state["data"])
        if checkpoint.step >= config.last_step_with(batches):
            _finish_complete_run(config, checkpoint, checkpoints, group, job)
            return
    decay_start = None if checkpoint else open_decay_start(config, loader, group)
    if decay_start:
        job.record_step(decay_start.step)
    start = checkpoint or decay_start
    batches = loader.batches_of(start.state["data"]) if start else loader.batches
    chosen = _choose_kernels(config, device, group, loader, start)
    engine = _build_engine(
        _with_kernels(config, chosen), device, group, start, config.total_steps_with(batches)
    )
    last_step = config.last_step_with(batches)
    events = _open_run(config, device, group, job, open_trackers, last_step, chosen)
    try:
        context = TrainingContext(config, engine, loader, group, events, job)
        trainer = Trainer(context, checkpoints)
        if start:
            trainer.restore(start)
        if decay_start:
            trainer.growth.publish_inherited()
        with mirroring(checkpoints.mirror, config, group, job, events):
            if decay_start:
                trainer.checkpoints.save(decay_start.step, wait=True)
            trainer.fit()
    finally:
        job.set_phase("closing", job.step)  # trackers may have much to send
        loader.close()
        events.close()


def _start_on_this_machine(group: RankGroup) -> float:
    """When the job's first rank on this machine came here, by this machine's clock."""
    host = platform.node()
    starts = group.all_gather((host, time.time()))
    return min(float(start) for name, start in starts if name == host)


def _open_checkpoints(config: Config, group: RankGroup, job: JobContext) -> CheckpointManager:
    """The checkpoints of the run folder, and their mirror."""
    root = config.run_dir / "checkpoints"
    return CheckpointManager(
        root,
        config.checkpoint,
        group,
        warn=lambda text: print_on_rank_0(group, text),
        may_commit=job.verify_lock,
        mirror=run_on_all_ranks(group, lambda: open_mirror(config, root, job)),
    )


def _finish_complete_run(
    config: Config,
    checkpoint: Checkpoint,
    checkpoints: CheckpointManager,
    group: RankGroup,
    job: JobContext,
) -> None:
    """Only mirror what is not mirrored yet: the run has made its last step."""
    with mirroring(checkpoints.mirror, config, group, job, EventBus()):
        print_on_rank_0(
            group,
            f"run {config.run_dir} is complete at step {checkpoint.step}; to train on, raise"
            " train.steps",
        )


def _choose_kernels(
    config: Config,
    device: torch.device,
    group: RankGroup,
    loader: Loader,
    start: Checkpoint | None,
) -> dict[str, dict[str, Any]]:
    """What operators the config leaves open and trials decide, as environment.json keeps it."""
    name = host_and_device(device)[1]

    def choose() -> dict[str, dict[str, Any]]:
        step = start.step if start else 0
        choices = kernel_choice.choose_kernels(
            config,
            device,
            name,
            lambda: loader.step_batches(step)[0],
            read_starts(config.run_dir),
        )
        for choice in choices:
            print_on_rank_0(group, choice.summary(name))
        return {choice.operator: choice.to_json() for choice in choices}

    return run_on_rank_0(group, choose)


def _with_kernels(config: Config, chosen: dict[str, dict[str, Any]]) -> Config:
    """The config with the implementations that were chosen, for building the model alone."""
    names = {operator: choice["name"] for operator, choice in chosen.items()}
    return config.model_copy(update={"model": config.model.model_copy(update=names)})


def _build_engine(
    config: Config,
    device: torch.device,
    group: RankGroup,
    checkpoint: Checkpoint | None,
    total_steps: int,
) -> Engine:
    """The engine with its weights: of a checkpoint, of train.init_from, or random ones."""
    initial_weights = None
    if checkpoint is None:
        initial_weights = run_on_all_ranks(group, lambda: open_initial_weights(config, group))
    check_causality(config, device)
    check_cross_entropy(config, device)
    random.seed(config.run.seed + group.rank)
    torch.manual_seed(config.run.seed + group.rank)
    engine = Engine(config, device)
    if checkpoint:
        restore_engine(engine, checkpoint, group)
        print_on_rank_0(
            group,
            f"resuming {checkpoint.folder.parents[1]} after step {checkpoint.step} of"
            f" {total_steps}",
        )
    if initial_weights:
        load_initial_weights(engine, initial_weights)
        print_on_rank_0(group, f"starting from the weights in {initial_weights.folder}")
    return engine


def _open_run(
    config: Config,
    device: torch.device,
    group: RankGroup,
    job: JobContext,
    open_trackers: OpenTrackers,
    last_step: int,
    chosen: dict[str, dict[str, Any]],
) -> EventBus:
    """Record this start in the run folder; returns the bus with rank 0's listeners."""
    first_step = job.step + 1
    job.start = describe_start(config, group.all_gather(host_and_device(device)), first_step)
    if chosen:
        job.start["kernels"] = chosen
    run_on_rank_0(group, lambda: open_run_folder(config, job.start))
    return run_on_all_ranks(
        group,
        lambda: EventBus(
            _listeners(config, first_step, last_step, open_trackers) if group.rank == 0 else []
        ),
    )


def _listeners(
    config: Config, first_step: int, last_step: int, open_trackers: OpenTrackers
) -> list[Listener]:
    """Trackers before the console: one that cannot start says so before the progress line."""
    trackers = open_trackers(config, first_step)
    files: list[Listener] = []
    if config.trackers.jsonl:
        settings = config.checkpoint
        max_failures = settings.max_failures if settings.on_failure == "continue" else 0
        path = config.run_dir / "metrics.jsonl"
        files.append(MetricsFile(path, first_step - 1, max_failures))
    return [*files, *trackers, ConsoleListener(first_step, last_step)]
