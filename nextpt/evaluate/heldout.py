"""What evaluation reads and writes: a checkpoint of a run, held-out documents, text files, a result."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import CheckpointError, DataError, DataPrepError
from nextpt.base.files import atomic_write, canonical_json
from nextpt.checkpoint.format import Checkpoint
from nextpt.checkpoint.selection import open_checkpoint
from nextpt.config import Config
from nextpt.exchange.decoder import load_model
from nextpt.model import Decoder


def open_run(run: Path, step: int | None = None, warn: Callable[[str], None] = print) -> Checkpoint:
    """The newest checkpoint of a run folder, or that of a step, verified.

    Raises CheckpointError.
    """
    if not run.is_dir():
        raise CheckpointError(
            f"run folder {run} does not exist; train first, or give the folder that holds"
            " checkpoints/"
        )
    return open_checkpoint(run / "checkpoints", step, warn)


def open_model(
    run: Path, step: int | None, device: torch.device | str
) -> tuple[Config, Decoder, Tokenizer, int]:
    """(config, model in evaluation mode, tokenizer, step) of a run."""
    checkpoint = open_run(run, step)
    config, model = load_model(checkpoint, device)
    tokenizer = Tokenizer(run / "tokenizer.json")
    return config, model, tokenizer, checkpoint.step


def heldout_texts(data: Path) -> dict[str, list[str]]:
    """Domain -> texts of the held-out documents of a dataset folder. Raises DataError."""
    files = sorted((data / "heldout_text").glob("*.jsonl"))
    if not files:
        raise DataError(
            f"{data} has no heldout_text/*.jsonl to evaluate on; prepare it, or name another folder"
            " with --data"
        )
    try:
        found = {
            f.stem: [json.loads(line)["text"] for line in open(f, encoding="utf-8")] for f in files
        }
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{data}/heldout_text cannot be read: {error}; prepare the data again"
        ) from error
    if not any(found.values()):
        raise DataError(f"{data} holds no held-out documents; prepare it with a larger --heldout")
    return {domain: texts for domain, texts in found.items() if texts}


def text_files(paths: Sequence[Path]) -> dict[str, list[str]]:
    """Name -> the text of a UTF-8 file, as one document; files of one name go by their paths.

    Raises DataError.
    """
    names = [
        path.name if sum(other.name == path.name for other in paths) == 1 else str(path)
        for path in paths
    ]
    return {name: [_read_text(path)] for name, path in zip(names, paths, strict=True)}


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")  # bytes as they are: line ends are not translated
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is no UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        ) from None
    if not text:
        raise DataError(f"{path} is empty; there is nothing to score")
    return text


def encode_document(tokenizer: Tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    """[start] + tokens + [end] of a document, and the bytes that each but the first stands for.

    Raises DataError.
    """
    try:
        ids, sizes = tokenizer.encode_with_bytes(text)
    except DataPrepError as error:
        raise DataError(f"a document cannot be scored: {error}") from None
    return np.concatenate(([tokenizer.start_id], ids, [tokenizer.end_id])), sizes


def write_result(result: dict[str, Any], path: Path) -> None:
    """Write the figures of an evaluation as JSON. Raises DataError."""
    try:
        with atomic_write(path) as file:
            file.write(canonical_json(result))
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from error
