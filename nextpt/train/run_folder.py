"""Run folder: its config and tokenizer, and whether its checkpoints are those of this run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from nextpt.base.errors import ConfigError, DataError, same_on_all_ranks
from nextpt.base.files import atomic_write
from nextpt.checkpoint.folders import steps
from nextpt.checkpoint.format import Checkpoint
from nextpt.config import Config, differences, load_config, to_yaml
from nextpt.data.loader import Loader
from nextpt.job.environment import record_start


def check_run_folder(config: Config) -> None:
    """Refuse a folder with checkpoints of a run that learns something else.

    Prints the keys that differ and may.

    Raises:
        ConfigError: With the keys that must not differ.
    """
    path = config.run_dir / "config.yaml"
    if not path.is_file() or not steps(config.run_dir / "checkpoints"):
        return
    try:
        before = load_config(path, warn_deprecated=False)
    except ConfigError as error:
        raise ConfigError(
            f"the record of this run's config is damaged: {error}; restore {path}, or rename it:"
            " the same command then writes it anew, and compares nothing"
        ) from error
    allowed, forbidden = differences(before, config)
    if forbidden:
        raise ConfigError(
            f"run folder {config.run_dir} holds another run ({'; '.join(forbidden)}); "
            "set these keys back, or give another run.dir"
        )
    if allowed:
        print(f"changed since the last start: {'; '.join(allowed)}", flush=True)


def check_data(config: Config, checkpoint: Checkpoint, loader: Loader) -> None:
    """Refuse a checkpoint of other data, unless checkpoint.accept_changed_data is set.

    Raises:
        DataError: With what differs.
    """
    if config.checkpoint.accept_changed_data:
        return
    try:
        loader.check_state(checkpoint.state["data"])
    except DataError as error:
        raise same_on_all_ranks(
            DataError(
                f"the data of {checkpoint.folder} is not that of {config.data.path}: {error}; give"
                " the old data, or checkpoint.accept_changed_data=true to train on with this all"
                " the same"
            )
        ) from None


def open_run_folder(config: Config, start: dict[str, Any]) -> None:
    """Write the resolved config, the tokenizer and the record of this start.

    So evaluation and generation need nothing but the folder.
    """
    config.run_dir.mkdir(parents=True, exist_ok=True)
    with atomic_write(config.run_dir / "config.yaml") as file:
        file.write(to_yaml(config))
    with (
        open(Path(config.data.path) / "tokenizer.json", "rb") as source,
        atomic_write(config.run_dir / "tokenizer.json", "wb") as target,
    ):
        shutil.copyfileobj(source, target)
    record_start(config.run_dir, start)
