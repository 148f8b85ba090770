"""Contamination report: an evaluation set against the training shards, with bits per byte."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.documents import read_documents
from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import DataError
from nextpt.checkpoint.state import WEIGHT
from nextpt.evaluate.documents import score_documents
from nextpt.evaluate.loaded_model import LoadedModel, open_model
from nextpt.evaluate.memorization.contamination import (
    DocumentOverlap,
    find_overlaps,
    training_texts,
)
from nextpt.evaluate.memorization.measure import bits_per_byte_by_contamination
from nextpt.evaluate.progress import Progress
from nextpt.evaluate.texts import encode_document, validation_texts


def examine(
    run: Path | None,
    step: int | None,
    data: Path | None,
    text: str | None,
    progress: Callable[[str, float], None],
    weights: str = WEIGHT,
    text_field: str = "text",
) -> dict[str, Any]:
    """Report which documents of an evaluation set share text with the training shards.

    Args:
        run: Run folder, for bits per byte with and without those documents, and for `data` where
            that is not given.
        step: Step of the run's checkpoint; the newest by default.
        data: Dataset folder whose training shards are searched.
        text: The evaluation set; by default the held-out texts of `data`.
        progress: Gets (what is done, share of it that is done).
        weights: Weights of the run: "weight", or an average such as "ema-0.999".
        text_field: Key of the text in the records of `text`.

    Returns:
        Counts per domain, and every contaminated document with the shares of its n-grams.

    Raises:
        DataError: Neither run nor data is given, or they cannot be read.
        DataPrepError: A text cannot be read.
    """
    loaded = None
    if run is not None:
        loaded = open_model(run, step, decoder_only=True, weights=weights)
        data, tokenizer = data or loaded.dataset, loaded.tokenizer
    elif data is None:
        raise DataError("no training shards to search; give --run or --data")
    else:
        tokenizer = Tokenizer(data / "tokenizer.json")
    texts_of = (
        {"text": [d.text for d in read_documents(text, text_field)]}
        if text
        else validation_texts(data)
    )
    training = training_texts(data, tokenizer, partial(progress, "training shards"))
    overlaps = find_overlaps(texts_of, training)
    result: dict[str, Any] = {
        "data": str(data),
        "text": text,
        **(loaded.to_json() if loaded else {"run": None, "step": None, "weights": None}),
        "domains": {},
    }
    for domain, texts in texts_of.items():
        of_domain = [overlap for overlap in overlaps if overlap.domain == domain]
        result["domains"][domain] = _counts(of_domain) | {
            "found": [
                {
                    "document": overlap.number,
                    **overlap.shares,
                    "begins": texts[overlap.number][:80],
                }
                for overlap in of_domain
                if overlap.contaminated
            ]
        }
        if loaded is not None:
            result["domains"][domain]["bits_per_byte"] = _bits_per_byte(
                loaded, texts, of_domain, partial(progress, domain)
            )
    return result


def _counts(overlaps: list[DocumentOverlap]) -> dict[str, Any]:
    return {
        "documents": len(overlaps),
        "contaminated": sum(overlap.contaminated for overlap in overlaps),
        "with_13_words": sum(overlap.shares["words"] > 0 for overlap in overlaps),
        "with_50_characters": sum(overlap.shares["characters"] > 0 for overlap in overlaps),
    }


def _bits_per_byte(
    loaded: LoadedModel, texts: list[str], overlaps: list[DocumentOverlap], progress: Progress
) -> dict[str, float | None]:
    encoded, sizes = zip(*(encode_document(loaded.tokenizer, text) for text in texts), strict=True)
    window = loaded.model.max_position
    _, nats = score_documents(
        loaded.model,
        encoded,
        sizes,
        loaded.tokenizer.token_bytes(),
        window=window,
        stride=window // 2,
        progress=progress,
    )
    return bits_per_byte_by_contamination(
        nats,
        np.array([int(s.sum()) for s in sizes]),
        np.array([overlap.contaminated for overlap in overlaps]),
    )
