"""Decoder built from a checkpoint, in evaluation mode."""

from __future__ import annotations

from pathlib import Path

import torch

from nextpt.base.errors import DataError
from nextpt.base.files import sha256_file
from nextpt.checkpoint.format import Checkpoint
from nextpt.config import Config, parse_config
from nextpt.model import Decoder, ModelSpec, parameter_shapes


def load_model(
    checkpoint: Checkpoint, device: torch.device | str = "cpu"
) -> tuple[Config, Decoder]:
    """Load the model of a checkpoint, fp32, in evaluation mode.

    Kernel implementations and the loss's workspace, which the run chose for the machine that
    trained it, are reset to their defaults. Modules of multi-token prediction are not loaded.

    Args:
        checkpoint: A verified checkpoint.
        device: Where the model is placed.

    Returns:
        The config of the run, and the model.

    Raises:
        CheckpointError: The checkpoint does not fit the config that it holds.
    """
    config = parse_config(checkpoint.state["config"], f"{checkpoint.folder}/state.json")
    spec = ModelSpec.from_config(config)
    checkpoint.check_weights(parameter_shapes(spec))
    model = Decoder(spec.inference)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(checkpoint.read_whole(name))
    return config, model.to(device).eval()


def check_tokenizer(checkpoint: Checkpoint, path: Path) -> None:
    """Refuse a tokenizer.json that is not byte for byte the one a checkpoint was trained with.

    Checkpoints of before 2026-12 have no hash of it and fit every file.

    Raises:
        DataError: It is another one.
    """
    expected = checkpoint.state.get("data", {}).get("tokenizer_sha256")
    if expected is not None and path.is_file() and sha256_file(path) != expected:
        raise DataError(
            f"{path} is not the tokenizer that the model of {checkpoint.folder} was trained with"
            " (its hash differs): copy the tokenizer.json of its dataset there"
        )
