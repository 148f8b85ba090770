"""Config loading: YAML file, overrides, deprecated keys and validation."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from nextpt.base.errors import ConfigError, DeprecatedNameWarning
from nextpt.config.hints import explain
from nextpt.config.keys import all_keys
from nextpt.config.schema import Config


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, warn_deprecated: bool = True
) -> Config:
    """Read a YAML file, apply overrides and check everything.

    Args:
        path: YAML file.
        overrides: Values that replace those of the file, each "key.sub=value".
        warn_deprecated: Issue a DeprecatedNameWarning for each deprecated key, on rank 0. False for
            a file that a user does not edit, such as the config.yaml of a run folder.

    Returns:
        The validated config.

    Raises:
        ConfigError: The file cannot be read, or a key or value is invalid. One line.
    """
    values, renamed = _merge(Path(path), overrides)
    config = parse_config(values, str(path))
    if warn_deprecated and os.environ.get("RANK", "0") == "0":
        for old, new in dict.fromkeys(renamed):
            warnings.warn(
                f"{path}: {old} is now {new}; rename the key, its old name will soon be an error",
                DeprecatedNameWarning,
                stacklevel=2,
            )
    return config


def read_values(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read the keys of a YAML file with overrides, by today's names and without defaults.

    Args:
        path: YAML file.
        overrides: Values that replace those of the file, each "key.sub=value".

    Returns:
        Section -> key -> value, not validated.

    Raises:
        ConfigError: The file cannot be read. One line.
    """
    values: dict[str, Any] = _merge(Path(path), overrides)[0]
    return values


def _merge(path: Path, overrides: Sequence[str]) -> tuple[Any, list[tuple[str, str]]]:
    """Read a YAML file and apply overrides.

    Returns:
        Nested dicts of values; (old name, new name) of the deprecated keys that were renamed.
    """
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist; those shipped are in configs/")
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r} is not of the form key.sub=value")
    try:
        loaded = OmegaConf.load(path)
        if not OmegaConf.is_dict(loaded):
            raise ConfigError(
                f"{path}: expected sections such as run:, model:, train:; the file holds a list or"
                " nothing"
            )
        parts = [OmegaConf.to_container(loaded), _override_values(overrides)]
        # Renamed before they are merged: an override replaces the value under its old name too.
        renamed = [pair for part in parts for pair in _rename_deprecated(part, str(path))]
        values = OmegaConf.to_container(OmegaConf.merge(*parts), resolve=True)
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    return values, renamed


def parse_config(values: Any, source: str) -> Config:
    """Check nested dicts of values, deprecated keys included.

    Args:
        values: Section -> key -> value.
        source: Named in errors.

    Returns:
        The validated config.

    Raises:
        ConfigError: A key or value is invalid. One line.
    """
    values = deepcopy(values)
    _rename_deprecated(values, source)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        phrases = dict.fromkeys(explain(details) for details in error.errors())
        raise ConfigError(f"{source}: {'; '.join(phrases)}") from None


def to_yaml(config: Config) -> str:
    """The whole config as YAML; loading it gives an equal config."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def _override_values(overrides: Sequence[str]) -> Any:
    return OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))


def _rename_deprecated(values: Any, source: str) -> list[tuple[str, str]]:
    """Rename deprecated keys in place.

    Returns:
        (old name, new name) of the keys that were there, dotted.
    """
    renamed = []
    for key in all_keys():
        section = values
        for part in key.parent.split("."):
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict):
            continue
        for old in key.metadata.deprecated:
            if old not in section:
                continue
            if key.leaf in section:
                raise ConfigError(
                    f"{source}: {key.parent}.{old} is the old name of {key.name}, and both are"
                    f" given; remove {key.parent}.{old}"
                )
            section[key.leaf] = section.pop(old)
            renamed.append((f"{key.parent}.{old}", key.name))
    return renamed
