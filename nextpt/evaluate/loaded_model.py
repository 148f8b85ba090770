"""Models opened for reading: from a run folder or a local Hugging Face folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import CheckpointError, DataError
from nextpt.checkpoint.format import Checkpoint
from nextpt.checkpoint.selection import open_checkpoint
from nextpt.checkpoint.state import WEIGHT
from nextpt.evaluate.hugging_face import HuggingFaceModel
from nextpt.exchange import load_hf
from nextpt.exchange.architectures import ARCHITECTURES
from nextpt.exchange.decoder import check_tokenizer, load_model
from nextpt.model import Decoder


@dataclass(frozen=True)
class LoadedModel:
    """A model and its tokenizer.

    Attributes:
        path: Folder that it was read from.
        model: In evaluation mode, fp32.
        tokenizer: Of the same folder.
        step: Step of the run's checkpoint; None for a Hugging Face folder.
        data: Dataset folder that the run was trained on; None for a Hugging Face folder.
        weights: Kind of state of the run's checkpoint that the model has.
    """

    path: Path
    model: Decoder | HuggingFaceModel
    tokenizer: Tokenizer
    step: int | None
    data: Path | None = None
    weights: str = WEIGHT

    @property
    def is_run(self) -> bool:
        """Whether the folder is a run's, not a Hugging Face folder."""
        return self.step is not None

    def to_json(self) -> dict[str, Any]:
        """Return which model it is, for results: folder, step and weights."""
        return {
            ("run" if self.is_run else "model"): str(self.path),
            "step": self.step,
            "weights": self.weights,
        }

    @property
    def decoder(self) -> Decoder:
        """The model where it is a Decoder, which has a key-value cache. Raises DataError."""
        if not isinstance(self.model, Decoder):
            raise DataError(
                f"{self.path} is run by the transformers library, which can score text here but not"
                f" generate it; architectures that can: {', '.join(sorted(ARCHITECTURES))}"
            )
        return self.model

    @property
    def dataset(self) -> Path:
        """The dataset folder of the run. Raises DataError for a Hugging Face folder."""
        if self.data is None:
            raise DataError(
                f"{self.path} is a Hugging Face folder, which has no dataset; give one with --data"
            )
        return self.data


def open_run(run: Path, step: int | None = None, weights: str = WEIGHT) -> Checkpoint:
    """Open the newest checkpoint of a run folder, or that of a step, and verify it.

    Args:
        run: The run folder.
        step: Step of the checkpoint; the newest by default.
        weights: "weight", or an average of the weights, such as "ema-0.999".

    Raises:
        CheckpointError: There is no such checkpoint, or it is damaged, or has no such weights.
    """
    if not run.is_dir():
        raise CheckpointError(
            f"run folder {run} does not exist; train first, or give the folder that holds"
            " checkpoints/"
        )
    checkpoint = open_checkpoint(run / "checkpoints", step)
    checkpoint.select_weights(weights)
    return checkpoint


def open_model(
    path: Path,
    step: int | None = None,
    device: torch.device | str = "cpu",
    *,
    decoder_only: bool = False,
    weights: str = WEIGHT,
) -> LoadedModel:
    """Open the model of a run folder or of a local Hugging Face folder.

    A Hugging Face folder holds config.json, *.safetensors and tokenizer.json; pickles are never
    read. Architectures that `nextpt import hf` knows become a Decoder; others are run by the
    transformers library where it is installed.

    Args:
        path: The folder.
        step: Step of a run's checkpoint; the newest by default.
        device: Where the model is put.
        decoder_only: Refuse models that only the transformers library can run.
        weights: See `open_run`.

    Raises:
        CheckpointError: The folder holds no model that can be read.
        DataPrepError: The tokenizer cannot be read.
        DataError: The tokenizer is not the one that the model was trained with.
    """
    if (path / "config.json").is_file():
        if step is not None:
            raise CheckpointError(
                f"{path} is a Hugging Face folder, which has no steps; leave --step out"
            )
        if weights != WEIGHT:
            raise CheckpointError(
                f"{path} is a Hugging Face folder, which has no averages; leave --weights out"
            )
        model = _open_hugging_face(path, device, decoder_only)
        loaded = LoadedModel(path, model, Tokenizer(path / "tokenizer.json"), None)
    else:
        checkpoint = open_run(path, step, weights=weights)
        check_tokenizer(checkpoint, path / "tokenizer.json")
        config, decoder = load_model(checkpoint, device)
        data = Path(config.data.path)
        loaded = LoadedModel(
            path, decoder, Tokenizer(path / "tokenizer.json"), checkpoint.step, data, weights
        )
    if loaded.tokenizer.vocab_size > loaded.model.vocab_size:
        raise DataError(
            f"{path}/tokenizer.json has {loaded.tokenizer.vocab_size} tokens, the model"
            f" {loaded.model.vocab_size}; it is not the tokenizer of this model"
        )
    return loaded


def _open_hugging_face(
    folder: Path, device: torch.device | str, decoder_only: bool
) -> Decoder | HuggingFaceModel:
    path = folder / "config.json"
    try:
        model_type = json.loads(path.read_text(encoding="utf-8-sig")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if model_type in ARCHITECTURES:
        return load_hf(folder, device)
    if decoder_only:
        raise CheckpointError(
            f"{path}: model_type = {model_type!r} cannot be imported; these can:"
            f" {', '.join(sorted(ARCHITECTURES))}"
        )
    return HuggingFaceModel.load(folder, device)
