"""Memorization report: extraction by prefix length, on training and held-out text, and canaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import DataError
from nextpt.data.sequences import SequenceSource
from nextpt.evaluate.memorization.canaries import Canary, exposure
from nextpt.evaluate.memorization.extraction import (
    NEAR,
    Spans,
    agreement,
    continuation_nats,
    mean,
    sample_spans,
    share,
)
from nextpt.evaluate.progress import PartProgress, ignore_part_progress
from nextpt.model import Decoder


def measure_extraction(
    model: Decoder,
    splits: dict[str, Sequence[SequenceSource]],
    *,
    prefixes: Sequence[int],
    continuation: int,
    count: int,
    seed: int = 0,
    progress: PartProgress = ignore_part_progress,
) -> dict[str, Any]:
    """Measure how much of its training text a model continues token for token.

    Args:
        model: In evaluation mode.
        splits: Split ("train", "validation") -> sequences of each domain.
        prefixes: Lengths of the prefixes, tokens.
        continuation: Tokens of the continuations.
        count: Spans of each split.
        seed: Seed of the choice of spans.
        progress: Gets (split, share of it that is done).

    Returns:
        Split -> "prefixes": {length: exact, near, score}, and "nats_per_token" of the same
        continuations after the longest prefix; and "gap_nats_per_token": held-out less training.

    Raises:
        DataError: The model's positions are too few, or a split has no document that is long
            enough.
    """
    length = max(prefixes) + continuation
    if length > model.max_position:
        raise DataError(
            f"a prefix of {max(prefixes)} and a continuation of {continuation} tokens are more than"
            f" the model's {model.max_position} positions; ask for shorter ones"
        )
    result: dict[str, Any] = {}
    for split, domains in splits.items():
        spans = sample_spans(domains, length, continuation, count, np.random.default_rng(seed))
        if not len(spans.tokens):
            raise DataError(
                f"no document of the {split} side has {length} tokens in one piece; ask for shorter"
                " prefixes or continuations"
            )
        by_prefix = {}
        for number, prefix in enumerate(prefixes):
            scores = agreement(model, spans, prefix)
            by_prefix[str(prefix)] = {
                "exact": share(scores == 1),
                "near": share(scores >= NEAR),
                "score": mean(scores),
            }
            progress(split, (number + 1) / len(prefixes))
        result[split] = {
            "sequences": len(spans.tokens),
            "prefixes": by_prefix,
            "nats_per_token": mean(continuation_nats(model, spans)),
        }
    if {"train", "validation"} <= result.keys():
        result["gap_nats_per_token"] = (
            result["validation"]["nats_per_token"]["mean"]
            - result["train"]["nats_per_token"]["mean"]
        )
    return result


def measure_canaries(
    model: Decoder,
    tokenizer: Tokenizer,
    canaries: Sequence[Canary],
    progress: PartProgress = ignore_part_progress,
) -> dict[str, Any]:
    """Measure extraction and exposure of canaries.

    Returns:
        Repeats -> share extracted (the second half of the tokens, given the first), score, exposure
        in bits, nats.

    Raises:
        DataError: A canary is longer than the model's positions.
    """
    by_repeats: dict[int, list[tuple[float, float]]] = {}
    for number, canary in enumerate(canaries):
        tokens = np.array(
            [[tokenizer.start_id, *tokenizer.encode(canary.text).tolist()]], dtype=np.int64
        )
        length = tokens.shape[1]
        if length > model.max_position:
            raise DataError(
                f"a canary has {length} tokens, more than the model's {model.max_position}"
                " positions; its tokenizer cuts them too finely for this context"
            )
        half = Spans(tokens, length // 2)
        score = agreement(model, half, length - half.continuation)
        nats = continuation_nats(model, Spans(tokens, length - 1)) * (length - 1)
        by_repeats.setdefault(canary.repeats, []).append((float(score[0]), float(nats[0])))
        progress("canaries", (number + 1) / len(canaries))
    controls = [nats for _, nats in by_repeats[0]]
    return {
        str(repeats): _summarize(by_repeats[repeats], controls, repeats)
        for repeats in sorted(by_repeats)
    }


def _summarize(
    canaries: list[tuple[float, float]], controls: list[float], repeats: int
) -> dict[str, Any]:
    """Summarize the (score, nats) of the canaries of one number of repeats."""
    scores = np.array([score for score, _ in canaries])
    # A control is ranked among the other controls
    others = (
        [controls[:i] + controls[i + 1 :] for i in range(len(controls))]
        if repeats == 0
        else [controls] * len(canaries)
    )
    exposures = np.array(
        [exposure(nats, rest) for (_, nats), rest in zip(canaries, others, strict=True)]
    )
    return {
        "extracted": share(scores == 1),
        "score": mean(scores),
        "exposure_bits": mean(exposures),
        "nats": mean(np.array([nats for _, nats in canaries])),
    }


def bits_per_byte_by_contamination(
    nats: np.ndarray, sizes: np.ndarray, contaminated: np.ndarray
) -> dict[str, float | None]:
    """Compute bits per byte of all, the clean and the contaminated documents: ratios of sums.

    Args:
        nats: Of each document, fp64 [documents].
        sizes: Bytes of each, int64 [documents].
        contaminated: bool [documents].
    """
    parts = {"all": np.ones(len(nats), bool), "clean": ~contaminated, "contaminated": contaminated}
    return {
        name: float(nats[p].sum() / (np.log(2) * sizes[p].sum())) if sizes[p].sum() else None
        for name, p in parts.items()
    }
