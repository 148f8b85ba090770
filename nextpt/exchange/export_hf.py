"""Export to a Hugging Face folder: safetensors, config.json, tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import CheckpointError
from nextpt.base.files import canonical_json
from nextpt.checkpoint.format import Checkpoint
from nextpt.config import parse_config
from nextpt.exchange.architectures import choose_architecture, hf_config
from nextpt.exchange.decoder import check_tokenizer
from nextpt.exchange.folders import new_folder
from nextpt.exchange.tensors import StoredTensor, stored_tensors
from nextpt.model import ModelSpec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHARD_BYTES = 4 * 2**30  # of one file; about twice as much is held in memory at once
# Exact values of the parameters that the other tensors give only to the last bit; read by import.
EXACT = "nextpt-exact.safetensors"


def export_hf(
    checkpoint: Checkpoint,
    tokenizer_path: Path,
    output: Path,
    *,
    dtype: str = "fp32",
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Write a checkpoint as a Hugging Face folder.

    Args:
        checkpoint: What is exported.
        tokenizer_path: The run's tokenizer.json.
        output: Folder to write; it must not exist.
        dtype: "fp32" or "bf16".
        shard_bytes: Size above which the weights are divided among files.

    Returns:
        Name of the transformers class.

    Raises:
        CheckpointError: No architecture can express the model, or the folder cannot be written;
            nothing is left behind.
        DataPrepError: The tokenizer cannot be read.
        DataError: The tokenizer is not the one that the model was trained with.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"--dtype {dtype} is not known; use one of {', '.join(DTYPES)}")
    config = parse_config(checkpoint.state["config"], f"{checkpoint.folder}/state.json")
    spec = ModelSpec.from_config(config).inference
    architecture = choose_architecture(spec)
    check_tokenizer(checkpoint, tokenizer_path)
    tokenizer = Tokenizer(tokenizer_path)
    described = hf_config(
        spec,
        start_id=tokenizer.start_id,
        end_id=tokenizer.end_id,
        dtype=str(DTYPES[dtype]).removeprefix("torch."),
    )
    stored = stored_tensors(spec, architecture)
    with new_folder(output) as folder:
        _write_weights(folder, checkpoint, stored, spec.width, DTYPES[dtype], shard_bytes)
        if dtype == "fp32" and (inexact := inexact_parameters(stored)):
            save_file({name: checkpoint.read_whole(name) for name in inexact}, folder / EXACT)
        _write_json(folder / "config.json", described)
        _write_json(
            folder / "generation_config.json",
            {
                "bos_token_id": tokenizer.start_id,
                "eos_token_id": tokenizer.end_id,
                "pad_token_id": tokenizer.end_id,
            },
        )
        _write_tokenizer(folder, tokenizer, spec.max_position)
    return architecture.name


def inexact_parameters(stored: list[StoredTensor]) -> list[str]:
    """Parameters that no tensor of the folder stores exactly."""
    exact = {s.parameter for s in stored if s.is_exact}
    return [s.parameter for s in stored if s.parameter is not None and s.parameter not in exact]


def _write_weights(
    folder: Path,
    checkpoint: Checkpoint,
    stored: list[StoredTensor],
    width: int,
    dtype: torch.dtype,
    limit: int,
) -> None:
    """Write one file, or several below `limit` bytes and their index, as transformers does."""
    shards = _divide(stored, dtype.itemsize, limit)
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for name, shard in zip(names, shards, strict=True):
        save_file(
            dict(_tensors(checkpoint, shard, width, dtype)),
            folder / name,
            metadata={"format": "pt"},
        )
    if len(shards) > 1:
        total = sum(math.prod(s.shape) for s in stored) * dtype.itemsize
        files = {s.hf_name: name for name, shard in zip(names, shards, strict=True) for s in shard}
        _write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": files},
        )


def _divide(stored: list[StoredTensor], itemsize: int, limit: int) -> list[list[StoredTensor]]:
    """Group consecutive tensors into shards below `limit` bytes, or of a single tensor."""
    shards: list[list[StoredTensor]] = [[]]
    used = 0
    for tensor in stored:
        size = math.prod(tensor.shape) * itemsize
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += size
    return shards


def _tensors(
    checkpoint: Checkpoint, shard: list[StoredTensor], width: int, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for tensor in shard:
        parameter = (
            checkpoint.read_whole(tensor.parameter) if tensor.parameter is not None else None
        )
        yield tensor.hf_name, tensor.to_hf(parameter, width).to(dtype)


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, max_position: int) -> None:
    """Write the tokenizer: it prepends the start token, as in training, and appends no end token.

    The end token would end generation.
    """
    start, end = tokenizer.token(tokenizer.start_id), tokenizer.token(tokenizer.end_id)
    tokenizer.write_with_start(folder / "tokenizer.json")
    tokens = {"bos_token": start, "eos_token": end}
    _write_json(folder / "special_tokens_map.json", tokens)
    _write_json(
        folder / "tokenizer_config.json",
        tokens
        | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_position,
            "clean_up_tokenization_spaces": False,
        },
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(canonical_json(value), encoding="utf-8")
