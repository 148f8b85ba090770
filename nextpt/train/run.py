"""One training job from start to end, on one rank: build, resume, train."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kernels.attention import choose_attention
from kernels.attention.features import asked
from kernels.causality import CausalityError, check_attention
from kernels.cross_entropy import pick
from nextpt.base.collective import (
    RankGroup,
    check_same_on_all_ranks,
    run_on_all_ranks,
    run_on_rank_0,
)
from nextpt.base.errors import CheckpointError, ConfigError, DataError, UserError
from nextpt.base.files import atomic_write
from nextpt.checkpoint.folders import step_of, steps
from nextpt.checkpoint.format import Checkpoint
from nextpt.checkpoint.manager import CheckpointManager, FailedSave
from nextpt.config import Config, differences, flatten, load_config, to_yaml
from nextpt.data.loader import Loader
from nextpt.events import CheckpointEvent, Event, Listener, MetricsFile, SaveFailedEvent
from nextpt.job.context import JobContext, job_context
from nextpt.job.environment import describe_start, place, record_start, versions
from nextpt.train.console import ConsoleListener
from nextpt.train.engine import Engine
from nextpt.train.loop import Outcomes, Trainer
from nextpt.train.memory import loss_chunking
from nextpt.train.mirroring import mirroring, open_mirror
from nextpt.train.process_group import start_distributed
from nextpt.train.randomness import get_rng, set_rng
from nextpt.train.start import open_start, start_from

OpenTrackers = Callable[[Config, int], list[Listener]]


def run_training(
    config: Config, open_trackers: OpenTrackers = lambda config, first_step: []
) -> None:
    """Train the run that `config` describes, resuming it when its folder holds checkpoints.

    Collective.

    open_trackers(config, first_step): further listeners, made on rank 0 only; the trainer knows no
    tracker by name. Raises UserError for everything a person can mend, before anything is written
    where that is possible (RunInUseError while another job works in the folder), and TrainingStopped when the
    job was told to end and did.
    """
    device = start_distributed()
    ranks = RankGroup.world()
    check_same_on_all_ranks(
        ranks, flatten({"config": config.model_dump(mode="json"), "versions": versions()})
    )
    config.accumulation_steps(ranks.world_size)
    check_hpz(config, [host for host, _ in ranks.all_gather(place(device))])
    with job_context(config.run_dir, ranks, config.train.hang_seconds) as job:
        _train(config, device, ranks, job, open_trackers)


def _train(
    config: Config,
    device: torch.device,
    ranks: RankGroup,
    job: JobContext,
    open_trackers: OpenTrackers,
) -> None:
    loader = run_on_all_ranks(
        ranks, lambda: Loader(config, ranks.rank, ranks.world_size, pin=device.type == "cuda")
    )
    root = config.run_dir / "checkpoints"
    mirror = run_on_all_ranks(ranks, lambda: open_mirror(config, root, job))
    manager = CheckpointManager(
        root, config.checkpoint, ranks, lambda text: _say(ranks, text), job.may_commit, mirror
    )
    check_same_on_all_ranks(ranks, flatten({"dataset": loader.state(0)}))
    run_on_rank_0(ranks, lambda: _check_run_folder(config))
    checkpoint = manager.resume()
    first_step = checkpoint.step + 1 if checkpoint else 1
    job.record_step(first_step - 1)
    if checkpoint:
        _check_data(config, checkpoint, loader)
        if first_step > config.last_step:
            with mirroring(
                mirror, config, ranks, job, lambda event: None, lambda text: _say(ranks, text)
            ):
                _say(
                    ranks,
                    f"run {config.run_dir} is complete at step {checkpoint.step}; to train on,"
                    " raise train.steps",
                )
            return
    start = (
        run_on_all_ranks(ranks, lambda: open_start(config, lambda text: _say(ranks, text)))
        if checkpoint is None
        else None
    )
    check_causality(config, device)
    check_loss(config, device)
    random.seed(config.run.seed + ranks.rank)
    torch.manual_seed(config.run.seed + ranks.rank)
    engine = Engine(config, device)
    if checkpoint:
        resume(engine, checkpoint, ranks)
        _say(
            ranks, f"resuming {config.run_dir} after step {checkpoint.step} of {config.total_steps}"
        )
    if start:
        start_from(engine, start)
        _say(ranks, f"starting from the weights in {start.folder}")
    places = ranks.all_gather(place(device))
    started = describe_start(config, places, first_step)
    run_on_rank_0(ranks, lambda: _open_run_folder(config, started))
    listeners = run_on_all_ranks(
        ranks, lambda: _listeners(config, first_step, open_trackers) if ranks.rank == 0 else []
    )

    def save_step(step: int, kept: dict[str, Any], wait: bool) -> Outcomes:
        extras = _extras(config, loader, step) | kept | {"start": started}
        validation = kept["validation"]
        return tell(
            lambda: manager.save(
                engine.state, extras, get_rng(), validation and validation["nats_per_token"], wait
            )
        )

    def go_back(step: int) -> dict[str, Any] | None:
        earlier = manager.rollback(step)
        if earlier is not None:
            resume(engine, earlier, ranks)
        return earlier and earlier.state

    def tell(finish: Callable[[], Outcomes]) -> Outcomes:
        try:
            outcomes = finish()
        except CheckpointError:
            run_on_all_ranks(
                ranks, job.check
            )  # that the folder was lost is another end than a failed save
            raise
        for one in outcomes:
            if isinstance(one, FailedSave):
                run_on_all_ranks(ranks, job.check)
                go_on_without(config, one)
                emit(
                    SaveFailedEvent(
                        one.step, str(one.error), one.error.rank, one.error.number, one.consecutive
                    )
                )
            else:
                folder = one.checkpoint.folder
                emit(
                    CheckpointEvent(
                        step_of(folder),
                        str(folder),
                        one.seconds,
                        one.checkpoint.bytes,
                        one.stall_seconds,
                    )
                )
        return outcomes

    def poll(wait: bool) -> Outcomes:
        outcomes = tell(lambda: manager.poll(wait))
        for event in mirror.news() if mirror else ():
            emit(event)
        return outcomes

    def emit(event: Event) -> None:
        for listener in listeners:
            listener.on_event(event)

    try:
        trainer = Trainer(config, engine, loader, ranks, save_step, poll, emit, job, go_back)
        if checkpoint:
            go_on(trainer, checkpoint)
        with mirroring(mirror, config, ranks, job, emit, lambda text: _say(ranks, text)):
            trainer.run(first_step)
    finally:
        job.set_phase("closing", job.progress.step)  # trackers may have much to send
        loader.close()
        for listener in listeners:
            listener.close()


def go_on_without(config: Config, failed: FailedSave) -> None:
    """Raises the error of a failed save where training must not go on without it."""
    settings = config.checkpoint
    if (
        settings.on_failure == "stop"
        or failed.consecutive >= settings.max_failures
        or failed.step == config.last_step
    ):
        raise failed.error


def check_causality(config: Config, device: torch.device) -> None:
    """Prove on this device that the attention of this run does not look ahead.

    Takes a fraction of a second.

    Raises ConfigError first where the named implementation cannot do what the run asks for.
    """
    dtype = (
        torch.bfloat16
        if config.train.precision == "bf16" and device.type == "cuda"
        else torch.float32
    )
    head = torch.empty(1, 1, 1, config.model.head_dim_, dtype=dtype, device="meta")
    try:
        choose_attention(
            config.model.attention,
            device.type,
            asked(head, head, documents=True, window=config.model.sliding_window),
        )
        check_attention(config.model.attention, device, dtype, config.model.sliding_window)
    except ValueError as error:
        raise ConfigError(f"model.attention = {config.model.attention}: {error}") from error
    except CausalityError as error:
        raise UserError(
            f"the attention of this installation is not causal: {error}; choose another"
            " model.attention"
        ) from error


def check_hpz(config: Config, hosts: list[str]) -> None:
    """Refuse groups of `train.hpz_ranks` that reach over hosts: they would gather over the network. hosts: of every rank, in order of rank.

    Raises ConfigError.
    """
    size = config.train.hpz_ranks or 1
    for first in range(0, len(hosts), size):
        if len(names := dict.fromkeys(hosts[first : first + size])) > 1:
            raise ConfigError(
                f"train.hpz_ranks = {size}: ranks {first} to {first + size - 1} are on different"
                f" hosts ({', '.join(names)}); give the number of ranks of one host, or a divisor"
                " of it"
            )


def check_loss(config: Config, device: torch.device) -> None:
    """Refuse a loss that cannot run here before the model is built. Raises ConfigError."""
    try:
        pick(config.model.cross_entropy, device.type)
    except ValueError as error:
        raise ConfigError(f"model.cross_entropy = {config.model.cross_entropy}: {error}") from error
    loss_chunking(config, device.type)


def resume(engine: Engine, checkpoint: Checkpoint, ranks: RankGroup) -> None:
    """Put the engine and the random states where the checkpoint has them.

    Collective. Raises CheckpointError.
    """
    checkpoint.check_state(engine.state.state_shapes())
    if checkpoint.state["scalars"].keys() != engine.state.scalars().keys():
        raise CheckpointError(
            f"checkpoint {checkpoint.folder} has the scalars {sorted(checkpoint.state['scalars'])},"
            f" expected {sorted(engine.state.scalars())}; it was not written by this nextpt"
        )
    engine.state.load(checkpoint, checkpoint.state["scalars"])
    checkpoint.close()
    try:
        if states := checkpoint.rng(ranks.rank):
            set_rng(states)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint.folder}: the random states of rank {ranks.rank} cannot be"
            f" used: {error}"
        ) from error


def go_on(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Put the trainer, its guard and its loader where the checkpoint has them.

    Raises CheckpointError.
    """
    try:
        trainer.load(checkpoint.state)
        trainer.loader.load_state(checkpoint.state["data"])
    except (KeyError, TypeError, ValueError) as error:
        refusal = CheckpointError(
            f"checkpoint {checkpoint.folder}: the state of the guard or of the data cannot be used:"
            f" {error}"
        )
        refusal.every_rank = False
        raise refusal from error


def _extras(config: Config, loader: Loader, step: int) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": step * config.tokens_per_step,
        "config": config.model_dump(mode="json"),
        "data": loader.state(step),
        "versions": versions(),
    }


def _check_run_folder(config: Config) -> None:
    """Refuse a folder that holds checkpoints of a run that differs in what it learns.

    Say what else differs.
    """
    path = config.run_dir / "config.yaml"
    if not path.is_file() or not steps(config.run_dir / "checkpoints"):
        return
    allowed, forbidden = differences(load_config(path, warn_deprecated=False), config)
    if forbidden:
        raise ConfigError(
            f"run folder {config.run_dir} holds another run ({'; '.join(forbidden)}); "
            "set these keys back, or give another run.dir"
        )
    if allowed:
        print(f"changed since the last start: {'; '.join(allowed)}", flush=True)


def _check_data(config: Config, checkpoint: Checkpoint, loader: Loader) -> None:
    """Refuse a checkpoint of other data, unless the person has said so."""
    if config.checkpoint.accept_changed_data:
        return
    try:
        loader.check_state(checkpoint.state["data"])
    except DataError as error:
        refusal = DataError(
            f"the data of {checkpoint.folder} is not that of {config.data.path}: {error}; give the"
            " old data, or checkpoint.accept_changed_data=true to train on with this all the same"
        )
        refusal.every_rank = False
        raise refusal from None


def _open_run_folder(config: Config, started: dict[str, Any]) -> None:
    """Write the resolved config and the tokenizer, so that the folder is all that evaluation and generation need."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    with atomic_write(config.run_dir / "config.yaml") as file:
        file.write(to_yaml(config))
    with (
        open(Path(config.data.path) / "tokenizer.json", "rb") as source,
        atomic_write(config.run_dir / "tokenizer.json", "wb") as target,
    ):
        shutil.copyfileobj(source, target)
    record_start(config.run_dir, started)


def _listeners(config: Config, first_step: int, open_trackers: OpenTrackers) -> list[Listener]:
    """Trackers first: one that cannot start must say so before the console takes the line."""
    trackers = open_trackers(config, first_step)
    files = (
        [MetricsFile(config.run_dir / "metrics.jsonl", first_step - 1)]
        if config.trackers.jsonl
        else []
    )
    return [*files, *trackers, ConsoleListener(first_step, config.last_step)]


def _say(ranks: RankGroup, text: str) -> None:
    if ranks.rank == 0:
        print(text, flush=True)
