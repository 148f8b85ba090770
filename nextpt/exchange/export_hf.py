"""A checkpoint as a Hugging Face folder: safetensors, config, tokenizer."""

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
from nextpt.exchange.folders import new_folder
from nextpt.exchange.tensors import Stored, stored_tensors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHARD_BYTES = 4 * 2**30  # of a file; about twice that is held in memory at once
# Parameters that the folder's tensors give only to the last bit; import reads it
EXACT = "nextpt-exact.safetensors"


def export_hf(
    checkpoint: Checkpoint,
    tokenizer_path: Path,
    output: Path,
    *,
    dtype: str = "fp32",
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Write the folder `output`, which must not exist; returns the name of the architecture.

    dtype: "fp32" or "bf16". shard_bytes: size above which weights are divided among files. Raises
    CheckpointError, and then nothing is left behind.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"--dtype {dtype} is not known; there are {', '.join(DTYPES)}")
    config = parse_config(checkpoint.state["config"], f"{checkpoint.folder}/state.json")
    c, architecture = config.model, choose_architecture(config.model, config.max_position)
    tokenizer = Tokenizer(tokenizer_path)
    described = hf_config(
        c,
        config.max_position,
        start_id=tokenizer.start_id,
        end_id=tokenizer.end_id,
        dtype=str(DTYPES[dtype]).removeprefix("torch."),
    )
    stored = stored_tensors(c, architecture)
    with new_folder(output) as folder:
        _write_weights(folder, checkpoint, stored, c.width, DTYPES[dtype], shard_bytes)
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
        _write_tokenizer(folder, tokenizer, config.max_position)
    return architecture.name


def inexact_parameters(stored: list[Stored]) -> list[str]:
    """Parameters that no tensor of the folder holds as they are."""
    same = {s.ours for s in stored if s.how == "same"}
    return [s.ours for s in stored if s.ours is not None and s.ours not in same]


def _write_weights(
    folder: Path,
    checkpoint: Checkpoint,
    stored: list[Stored],
    width: int,
    dtype: torch.dtype,
    limit: int,
) -> None:
    """One file, or several below `limit` bytes and their index, as transformers names them."""
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
        places = {s.theirs: name for name, shard in zip(names, shards, strict=True) for s in shard}
        _write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": places},
        )


def _divide(stored: list[Stored], itemsize: int, limit: int) -> list[list[Stored]]:
    """Runs of tensors, each below `limit` bytes unless it is a single tensor."""
    shards: list[list[Stored]] = [[]]
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
    checkpoint: Checkpoint, shard: list[Stored], width: int, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for tensor in shard:
        parameter = checkpoint.read_whole(tensor.ours) if tensor.ours is not None else None
        yield tensor.theirs, tensor.make(parameter, width).to(dtype)


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, max_position: int) -> None:
    """tokenizer.json that puts the start token before a text, as training did, and never the end, which ends generation."""
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
