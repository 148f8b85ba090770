"""Length of a run in epochs: counts the training sequences of the dataset into the config."""

from __future__ import annotations

from pathlib import Path

from data_prep.format import DatasetManifest
from nextpt.config import Config, parse_config
from nextpt.data.remote import RemoteDataset
from nextpt.data.scratch import ScratchFolder
from nextpt.data.sequences import load_manifest


def count_epoch(config: Config) -> Config:
    """Return the config with train.epoch_sequences, if it has train.epochs and lacks that.

    Fetches the dataset's tables where it is remote; a `Loader` counts in what it has fetched.

    Raises:
        ConfigError: What follows from the length is wrong.
        DataError: The dataset is missing or damaged.
    """
    if config.train.epochs is None or config.train.epoch_sequences is not None:
        return config
    data = config.data
    if data.remote:
        RemoteDataset(data.remote, Path(data.path)).fetch_dataset(ScratchFolder(data.scratch))
    return count_epoch_of(config, load_manifest(data.path))


def count_epoch_of(config: Config, manifest: DatasetManifest) -> Config:
    """As `count_epoch`, of a dataset that is open.

    Raises:
        ConfigError: What follows from the length is wrong.
    """
    if config.train.epochs is None or config.train.epoch_sequences is not None:
        return config
    sequences = sum(counts.sequences for counts in manifest.splits["train"].values())
    values = config.model_dump(mode="json")
    values["train"]["epoch_sequences"] = sequences
    return parse_config(values, f"train.epochs of {config.data.path}")
