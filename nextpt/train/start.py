"""Starting from the weights of a model that others trained: config key train.init_from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nextpt.base.errors import ConfigError, DataError, DataPrepError
from nextpt.config import Config
from nextpt.exchange import HFWeights, different_keys, same_vocabulary
from nextpt.train.engine import Engine


def open_start(config: Config, warn: Callable[[str], None]) -> HFWeights | None:
    """The weights to start from, None when they are drawn; read only when they are loaded.

    Keys in which the config computes something else with them are named through `warn`. Raises
    ConfigError when they are not of this model, DataError when the dataset was made with another
    tokenizer.
    """
    if config.train.init_from is None:
        return None
    weights = HFWeights(Path(config.train.init_from))
    shapes, others = different_keys(weights, config)
    if shapes:
        raise ConfigError(
            f"train.init_from = {config.train.init_from} holds another model: {'; '.join(shapes)}"
        )
    if others:
        warn(f"warning: {'; '.join(others)} in train.init_from; going on with those of the config")
    check_tokenizer(config)
    return weights


def check_tokenizer(config: Config) -> None:
    """Raise DataError when the dataset was made with another tokenizer than that in train.init_from, if there is one."""
    theirs = Path(config.train.init_from) / "tokenizer.json"
    mine = Path(config.data.path) / "tokenizer.json"
    if not theirs.is_file():
        return
    try:
        same = same_vocabulary(theirs, mine)
    except DataPrepError as error:
        raise DataError(str(error)) from None
    if not same:
        raise DataError(
            f"{mine} is not the tokenizer of the model in train.init_from: prepare the data with"
            f" --tokenizer {theirs}"
        )


def start_from(engine: Engine, weights: HFWeights) -> None:
    """Put the weights into the engine, each rank its own part.

    Moments and the count of updates are zero. Collective.
    """
    engine.state.load(weights, dict.fromkeys(engine.state.scalars(), 0.0))
