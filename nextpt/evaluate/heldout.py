"""Evaluating a checkpoint of a run on held-out documents, per domain."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.errors import PrepError
from data_prep.files import atomic_write, canonical_json
from data_prep.tokenizer import Tokenizer
from nextpt.checkpoint.commit import open_newest
from nextpt.checkpoint.format import Checkpoint
from nextpt.checkpoint.restore import load_model
from nextpt.config import Config
from nextpt.errors import CheckpointError, DataError
from nextpt.evaluate.compressors import compare
from nextpt.evaluate.documents import score_documents
from nextpt.evaluate.metrics import Figures
from nextpt.model import Decoder


def open_run(run: Path, step: int | None = None, warn: Callable[[str], None] = print) -> Checkpoint:
    """The newest checkpoint of a run folder, or that of a step, verified. Raises CheckpointError."""
    if not run.is_dir():
        raise CheckpointError(f"run folder {run} does not exist; train first, or give the folder that holds checkpoints/")
    return open_newest(run / "checkpoints", step, warn)


def open_model(run: Path, step: int | None, device: torch.device | str) -> tuple[Config, Decoder, Tokenizer, int]:
    """(config, model in evaluation mode, tokenizer, step) of a run."""
    checkpoint = open_run(run, step)
    config, model = load_model(checkpoint, device)
    try:
        tokenizer = Tokenizer(run / "tokenizer.json")
    except PrepError as error:
        raise DataError(str(error)) from None
    return config, model, tokenizer, checkpoint.step


def heldout_texts(data: Path) -> dict[str, list[str]]:
    """domain -> texts of the held-out documents of a dataset folder. Raises DataError."""
    files = sorted((data / "heldout_text").glob("*.jsonl"))
    if not files:
        raise DataError(f"{data} has no heldout_text/*.jsonl to evaluate on; prepare it, or name another folder with --data")
    try:
        found = {f.stem: [json.loads(line)["text"] for line in open(f, encoding="utf-8")] for f in files}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{data}/heldout_text cannot be read: {error}; prepare the data again") from error
    if not any(found.values()):
        raise DataError(f"{data} holds no held-out documents; prepare it with a larger --heldout")
    return {domain: texts for domain, texts in found.items() if texts}


def evaluate_run(run: Path, *, step: int | None = None, data: Path | None = None, window: int | None = None,
                 stride: int | None = None, compressors: bool = False, device: torch.device | str = "cpu",
                 progress: Callable[[str, float], None] = lambda domain, share: None) -> dict[str, Any]:
    """Figures per domain and in total; the form of `nextpt eval --json`.

    data: dataset folder, the one that the run was trained on unless given. window: tokens of context, the longest the
    model has unless given. stride: tokens scored per window after the first, window / 2 unless given. compressors:
    also measure general-purpose compressors on the same bytes. progress: hears (domain, share of it that is done).
    """
    config, model, tokenizer, at = open_model(run, step, device)
    texts = heldout_texts(data or Path(config.data.path))
    token_bytes = tokenizer.token_bytes()
    window = window or config.max_position
    if not 2 <= window <= config.max_position:
        raise DataError(f"window = {window} must be between 2 and the model's {config.max_position} positions")
    stride = stride or window // 2
    if not 1 <= stride <= window:
        raise DataError(f"stride = {stride} must be between 1 and the window, {window}")
    domains: dict[str, Any] = {}
    nats = tokens = size = 0
    for domain, documents in texts.items():
        encoded, sizes = zip(*(encode_document(tokenizer, text) for text in documents), strict=True)
        figures, _ = score_documents(model, encoded, sizes, token_bytes, window=window, stride=stride, progress=partial(progress, domain))
        domains[domain] = figures.as_dict() | {"documents": len(documents)}
        if compressors:
            domains[domain]["compressors"] = compare([text.encode() for text in documents])
        nats, tokens, size = nats + figures.nats, tokens + figures.tokens, size + figures.bytes
    return {
        "run": str(run), "step": at, "window": window, "stride": stride,
        "domains": domains, "total": Figures(tokens, size, nats).as_dict(),
    }


def encode_document(tokenizer: Tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    """[start] + tokens + [end] of a document, and the bytes that each but the first stands for. Raises DataError."""
    try:
        ids, sizes = tokenizer.encode_with_bytes(text)
    except PrepError as error:
        raise DataError(f"a held-out document cannot be scored: {error}") from None
    return np.concatenate(([tokenizer.start_id], ids, [tokenizer.end_id])), sizes


def write_result(result: dict[str, Any], path: Path) -> None:
    """Write the figures of `evaluate_run` as JSON. Raises DataError."""
    try:
        with atomic_write(path) as file:
            file.write(canonical_json(result))
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from error
