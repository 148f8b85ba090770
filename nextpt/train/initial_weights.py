"""Initial weights from a Hugging Face folder: config key train.init_from."""

from __future__ import annotations

from pathlib import Path

from nextpt.base.collective import RankGroup
from nextpt.base.errors import ConfigError, DataError
from nextpt.config import Config
from nextpt.exchange import HFWeights, different_keys, same_vocabulary
from nextpt.train.console import print_on_rank_0
from nextpt.train.engine import Engine


def open_initial_weights(config: Config, group: RankGroup) -> HFWeights | None:
    """Open the weights of train.init_from; they are read only when they are loaded.

    Warns of keys with which the config computes something else from the weights.

    Args:
        config: The run.
        group: Rank 0 of them prints the warning.

    Returns:
        None without train.init_from.

    Raises:
        ConfigError: When the weights are of another model.
        DataError: When the dataset was prepared with another tokenizer.
    """
    if config.train.init_from is None:
        return None
    folder = Path(config.train.init_from)
    weights = HFWeights(folder)
    shapes, others = different_keys(weights, config)
    if shapes:
        raise ConfigError(f"train.init_from = {folder} holds another model: {'; '.join(shapes)}")
    if others:
        print_on_rank_0(
            group,
            f"warning: {'; '.join(others)} in train.init_from; using those of the config",
        )
    check_tokenizer(folder, Path(config.data.path))
    return weights


def check_tokenizer(model: Path, dataset: Path) -> None:
    """Refuse a dataset that was prepared with another tokenizer than the model's, if it has one.

    Raises:
        DataError: With the option of `nextpt prep` that fixes it.
    """
    model_tokenizer, data_tokenizer = model / "tokenizer.json", dataset / "tokenizer.json"
    if not model_tokenizer.is_file():
        return
    if not same_vocabulary(model_tokenizer, data_tokenizer):
        raise DataError(
            f"{data_tokenizer} is not the tokenizer of the model in train.init_from: prepare the"
            f" data with --tokenizer {model_tokenizer}"
        )


def load_initial_weights(engine: Engine, weights: HFWeights) -> None:
    """Load the weights into the engine, each rank its own part. Collective.

    Moments and the count of updates are zero.
    """
    engine.state.load(weights, dict.fromkeys(engine.state.scalars(), 0.0))
