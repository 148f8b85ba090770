"""The contamination report: an evaluation set against the training shards of a dataset, and what it does to bits per byte."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.documents import read_documents
from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import DataError
from nextpt.config import Config
from nextpt.evaluate.documents import score_documents
from nextpt.evaluate.heldout import encode_document, heldout_texts, open_model
from nextpt.evaluate.memorization.contamination import Found, find_overlaps, training_texts
from nextpt.evaluate.memorization.measure import bits_per_byte_by_contamination
from nextpt.model import Decoder


def examine(
    run: Path | None,
    step: int | None,
    data: Path | None,
    text: str | None,
    progress: Callable[[str, float], None],
) -> dict[str, Any]:
    """Counts per domain, and every document found with the shares of its stretches that the training shards have.

    run: for bits per byte with and without those documents, and for `data` where that is not given.
    text: the evaluation set, the held-out texts of `data` unless given. Raises DataError without
    any of run and data, DataPrepError for a text that cannot be read.
    """
    config = model = None
    if run is not None:
        config, model, tokenizer, step = open_model(run, step, "cpu")
        data = data or Path(config.data.path)
    elif data is None:
        raise DataError("whose training shards? give --run or --data")
    else:
        tokenizer = Tokenizer(data / "tokenizer.json")
    sets = {"text": [d.text for d in read_documents(text)]} if text else heldout_texts(data)
    found = find_overlaps(
        sets, training_texts(data, tokenizer, partial(progress, "training shards"))
    )
    result: dict[str, Any] = {
        "data": str(data),
        "text": text,
        "run": str(run) if run else None,
        "step": step,
        "domains": {},
    }
    for domain, texts in sets.items():
        own = [f for f in found if f.domain == domain]
        result["domains"][domain] = _counts(own) | {
            "found": [
                {"document": f.number, **f.shares, "begins": texts[f.number][:80]}
                for f in own
                if f.contaminated
            ]
        }
        if model is not None and config is not None:
            result["domains"][domain]["bits_per_byte"] = _bits_per_byte(
                config, model, tokenizer, texts, own, partial(progress, domain)
            )
    return result


def _counts(own: list[Found]) -> dict[str, int]:
    return {
        "documents": len(own),
        "contaminated": sum(f.contaminated for f in own),
        "with_13_words": sum(f.shares["words"] > 0 for f in own),
        "with_50_characters": sum(f.shares["characters"] > 0 for f in own),
    }


def _bits_per_byte(
    config: Config,
    model: Decoder,
    tokenizer: Tokenizer,
    texts: list[str],
    found: list[Found],
    progress: Callable[[float], None],
) -> dict[str, float | None]:
    encoded, sizes = zip(*(encode_document(tokenizer, text) for text in texts), strict=True)
    window = config.max_position
    _, nats = score_documents(
        model,
        encoded,
        sizes,
        tokenizer.token_bytes(),
        window=window,
        stride=window // 2,
        progress=progress,
    )
    return bits_per_byte_by_contamination(
        nats, np.array([int(s.sum()) for s in sizes]), np.array([f.contaminated for f in found])
    )
