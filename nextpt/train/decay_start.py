"""Start of a decay: a new run that begins at a checkpoint of a long stable run (train.decay_from).

The new run has the stable run's weights, optimizer state, random states and data position at that
step; only its learning rate differs from there on. So one stable run gives models of several
lengths. Its first act is to save that state in its own folder, so the stable run may remove its
checkpoint.
"""

from __future__ import annotations

from pathlib import Path

from nextpt.base.collective import RankGroup
from nextpt.base.errors import ConfigError
from nextpt.checkpoint.folders import steps
from nextpt.checkpoint.format import Checkpoint
from nextpt.checkpoint.selection import read_on_rank_0, select_checkpoint
from nextpt.config import Config, differences, parse_config
from nextpt.data.loader import Loader
from nextpt.optim.schedules import learning_rate
from nextpt.train.console import print_on_rank_0
from nextpt.train.run_folder import check_data

# Keys in which a decay may differ from its stable run, beside those that a resumed run may change
DECAY_KEYS = (
    "run.name",
    "run.dir",
    "schedule.kind",
    "schedule.decay",
    "schedule.decay_shape",
    "schedule.final_ratio",
)


def open_decay_start(config: Config, loader: Loader, group: RankGroup) -> Checkpoint | None:
    """Open the checkpoint of train.decay_from. Collective.

    Args:
        config: The new run.
        loader: Its data.
        group: All ranks.

    Returns:
        The checkpoint, verified; None without train.decay_from.

    Raises:
        CheckpointError: There is no such checkpoint, or it is damaged.
        ConfigError: It is of a run that learns something else, or had begun to decay.
        DataError: It is of other data.
    """
    source = config.train.decay_from
    if source is None:
        return None
    root = Path(source.run) / "checkpoints"
    available = read_on_rank_0(root, group, lambda: steps(root))
    if source.at_step not in available:
        raise ConfigError(
            f"train.decay_from.at_step = {source.at_step}: {root} has no checkpoint of that step;"
            f" there are: {', '.join(map(str, available)) or 'none'}"
        )
    checkpoint = select_checkpoint(
        root,
        source.at_step,
        group,
        warn=lambda text: print_on_rank_0(group, text),
    )
    assert checkpoint is not None  # a step was asked for
    stable = parse_config(checkpoint.state["config"], f"{checkpoint.folder}/state.json")
    _check_same_run(config, stable)
    check_data(config, checkpoint, loader)
    loader.load_state(checkpoint.state["data"])
    before, after = (learning_rate(run, source.at_step, loader.batches) for run in (stable, config))
    if before != after:
        raise ConfigError(
            f"train.decay_from.at_step = {source.at_step}: {source.run} had the learning rate"
            f" {before:g} at that step and a decay begins at {after:g}: its own decay had begun,"
            " or its schedule has no stable part; give an earlier step, or the same optimizer.lr"
        )
    return checkpoint


def _may_differ(name: str) -> bool:
    return name in DECAY_KEYS or f"{name}.".startswith("train.decay_from.")


def _check_same_run(config: Config, stable: Config) -> None:
    forbidden = [
        phrase
        for phrase in differences(stable, config)[1]
        if not _may_differ(phrase.partition(":")[0])
    ]
    if forbidden:
        raise ConfigError(
            f"train.decay_from.run is another run ({'; '.join(forbidden)}); set these keys back"
        )
