"""A model to read with, wherever it comes from: a run folder of ours or a local Hugging Face folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import CheckpointError, DataError
from nextpt.config import Config
from nextpt.evaluate.foreign import ForeignModel, foreign_config
from nextpt.evaluate.heldout import open_model
from nextpt.exchange import load_hf
from nextpt.exchange.architectures import ARCHITECTURES
from nextpt.model import Decoder


@dataclass(frozen=True)
class Source:
    """path: the folder. step: of a run's checkpoint, None of a Hugging Face folder. model: in evaluation mode, fp32.

    A ForeignModel scores tokens as a Decoder does, but has no key-value cache of ours.
    """

    path: Path
    config: Config
    model: Decoder | ForeignModel
    tokenizer: Tokenizer
    step: int | None

    @property
    def is_run(self) -> bool:
        return self.step is not None


def open_source(
    path: Path,
    step: int | None = None,
    device: torch.device | str = "cpu",
    *,
    decoder_only: bool = False,
) -> Source:
    """The model of a run folder (its newest checkpoint, or that of a step) or of a local Hugging Face folder.

    A Hugging Face folder holds config.json, *.safetensors and tokenizer.json; pickles are never
    read. Architectures that `nextpt import hf` knows become a Decoder; others are run by the
    transformers library where it is installed, and are refused with decoder_only. Raises
    CheckpointError, or DataError for a tokenizer that is missing or does not fit.
    """
    if (path / "config.json").is_file():
        if step is not None:
            raise CheckpointError(
                f"{path} is a Hugging Face folder, which has no steps; leave --step out"
            )
        config, model = _open_hf(path, device, decoder_only)
        source = Source(path, config, model, Tokenizer(path / "tokenizer.json"), None)
    else:
        config, model, tokenizer, at = open_model(path, step, device)
        source = Source(path, config, model, tokenizer, at)
    if source.tokenizer.vocab_size > source.config.model.vocab_size:
        raise DataError(
            f"{path}/tokenizer.json has {source.tokenizer.vocab_size} tokens, the model"
            f" {source.config.model.vocab_size}; it is not the tokenizer of this model"
        )
    return source


def _open_hf(
    folder: Path, device: torch.device | str, decoder_only: bool
) -> tuple[Config, Decoder | ForeignModel]:
    path = folder / "config.json"
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if kind in ARCHITECTURES:
        return load_hf(folder, device)
    if decoder_only:
        raise CheckpointError(
            f"{path}: model_type = {kind!r} cannot be imported; these can:"
            f" {', '.join(sorted(ARCHITECTURES))}"
        )
    model = ForeignModel.load(folder, device)
    return foreign_config(folder, model), model
