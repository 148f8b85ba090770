"""Config loading: YAML file, overrides, deprecated keys and validation."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from nextpt.base.errors import ConfigError, DeprecatedNameWarning
from nextpt.base.files import expand_home
from nextpt.config.hints import explain
from nextpt.config.keys import all_keys
from nextpt.config.reader import read_override, read_yaml, text_keys
from nextpt.config.schema import Config


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, warn_deprecated: bool = True
) -> Config:
    """Read a YAML file, apply overrides and check everything.

    Args:
        path: YAML file.
        overrides: Values that replace those of the file, each "key.sub=value", in order. A
            mapping replaces the whole one of the file; single keys change one value.
        warn_deprecated: Issue a DeprecatedNameWarning for each deprecated key, on rank 0. False for
            a file that a user does not edit, such as the config.yaml of a run folder.

    Returns:
        The validated config.

    Raises:
        ConfigError: The file cannot be read, or a key or value is invalid. One line.
    """
    values, renamed = _merge(path, overrides)
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
    values: dict[str, Any] = _merge(path, overrides)[0]
    return values


def _merge(path: str | Path, overrides: Sequence[str]) -> tuple[Any, list[tuple[str, str]]]:
    """Read a YAML file and apply overrides.

    Returns:
        Nested dicts of values; (old name, new name) of the deprecated keys that were renamed.
    """
    path = Path(expand_home(str(path)))
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist; those shipped are in configs/")
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r} is not of the form key.sub=value")
    try:
        values = read_yaml(path.read_text(encoding="utf-8-sig"), _text_keys())
        if not isinstance(values, dict):
            raise ConfigError(
                f"{path}: expected sections such as run:, model:, train:; the file holds a list or"
                " nothing"
            )
        renamed = _rename_deprecated(values, str(path))
        for override in overrides:
            renamed += _apply_override(values, override)
        renamed += _rename_deprecated(values, str(path))  # below a section given as a whole
        values = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply, or a value contains itself") from None
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


@cache
def _text_keys() -> frozenset[str]:
    return text_keys(Config)


def _apply_override(values: dict[str, Any], override: str) -> list[tuple[str, str]]:
    """Put "key.sub=value" in its place; items of lists are key.0 or key[0].

    Returns:
        (old name, new name) where the key is deprecated.
    """
    name, _, text = override.partition("=")
    parts = name.strip().replace("[", ".").replace("]", "").split(".")
    old_name = ".".join(parts)
    new_name = _new_names().get(old_name, old_name)
    *parents, leaf = new_name.split(".")
    value = read_override(text, new_name, _text_keys())
    section: Any = values
    for part, following in zip(parents, [*parents, leaf][1:], strict=True):
        child = _item(section, part, override)
        if not isinstance(child, dict) and not (isinstance(child, list) and following.isdigit()):
            child = {}
            _set_item(section, part, child, override)
        section = child
    _set_item(section, leaf, value, override)
    return [(old_name, new_name)] if new_name != old_name else []


def _item(section: Any, part: str, override: str) -> Any:
    if isinstance(section, dict):
        return section.get(part)
    return section[_index(section, part, override)]


def _set_item(section: Any, part: str, value: Any, override: str) -> None:
    section[part if isinstance(section, dict) else _index(section, part, override)] = value


def _index(items: list[Any], part: str, override: str) -> int:
    if not part.isdecimal() or int(part) >= len(items):
        raise ConfigError(f"override {override!r}: the list has {len(items)} items, from 0 on")
    return int(part)


@cache
def _new_names() -> dict[str, str]:
    """Old dotted name -> name of every deprecated key."""
    return {
        f"{key.parent}.{old}": key.name for key in all_keys() for old in key.metadata.deprecated
    }


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
