"""One report about what a run has by heart: extraction by length of the prefix, train against held-out, and canaries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import DataError
from nextpt.config import Config
from nextpt.data.sequences import SequenceSource
from nextpt.evaluate.memorization.canaries import Canary, exposure
from nextpt.evaluate.memorization.extraction import (
    NEAR,
    Sequences,
    continuation_nats,
    mean,
    sample_sequences,
    scores,
    share,
)
from nextpt.model import Decoder

Progress = Callable[[str, float], None]


def silent(what: str, part: float) -> None:
    """The progress that nobody watches."""


def measure_extraction(
    config: Config,
    model: Decoder,
    sides: dict[str, Sequence[SequenceSource]],
    *,
    prefixes: Sequence[int],
    continuation: int,
    count: int,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Side ("train", "heldout") -> "prefixes": {length: exact, near, score}, and "nats_per_token" of the same continuations after the longest prefix; and "gap": held-out nats less those of training.

    Raises DataError where the context has no room for them, or a side has no document that is long
    enough.
    """
    length = max(prefixes) + continuation
    if length > config.max_position:
        raise DataError(
            f"a prefix of {max(prefixes)} and a continuation of {continuation} tokens are more than"
            f" the model's {config.max_position} positions; ask for shorter ones"
        )
    found: dict[str, Any] = {}
    for side, rows in sides.items():
        sequences = sample_sequences(rows, length, continuation, count, np.random.default_rng(seed))
        if not len(sequences.tokens):
            raise DataError(
                f"no document of the {side} side has {length} tokens in one piece; ask for shorter"
                " prefixes or continuations"
            )
        found[side] = {
            "sequences": len(sequences.tokens),
            "prefixes": {},
            "nats_per_token": mean(continuation_nats(model, sequences)),
        }
        for number, prefix in enumerate(prefixes):
            agreed = scores(config, model, sequences, prefix)
            found[side]["prefixes"][str(prefix)] = {
                "exact": share(agreed == 1),
                "near": share(agreed >= NEAR),
                "score": mean(agreed),
            }
            progress(side, (number + 1) / len(prefixes))
    if {"train", "heldout"} <= found.keys():
        found["gap_nats_per_token"] = (
            found["heldout"]["nats_per_token"]["mean"] - found["train"]["nats_per_token"]["mean"]
        )
    return found


def measure_canaries(
    config: Config,
    model: Decoder,
    tokenizer: Tokenizer,
    canaries: Sequence[Canary],
    progress: Progress = silent,
) -> dict[str, Any]:
    """Repeats -> canaries, share extracted (the second half of its tokens, given the first), score, exposure (bits), nats.

    Raises DataError for canaries that are longer than the context.
    """
    rows: dict[int, list[tuple[float, float]]] = {}
    for number, canary in enumerate(canaries):
        tokens = np.array(
            [[tokenizer.start_id, *tokenizer.encode(canary.text).tolist()]], dtype=np.int64
        )
        if tokens.shape[1] > config.max_position:
            raise DataError(
                f"a canary has {tokens.shape[1]} tokens, more than the model's"
                f" {config.max_position} positions; its tokenizer cuts them too finely for this"
                " context"
            )
        half = Sequences(tokens, tokens.shape[1] // 2)
        agreed = scores(config, model, half, tokens.shape[1] - half.continuation)
        nats = continuation_nats(model, Sequences(tokens, tokens.shape[1] - 1)) * (
            tokens.shape[1] - 1
        )
        rows.setdefault(canary.repeats, []).append((float(agreed[0]), float(nats[0])))
        progress("canaries", (number + 1) / len(canaries))
    controls = [nats for _, nats in rows[0]]
    return {
        str(repeats): _canaries_of(rows[repeats], controls, repeats) for repeats in sorted(rows)
    }


def _canaries_of(
    found: list[tuple[float, float]], controls: list[float], repeats: int
) -> dict[str, Any]:
    agreed = np.array([score for score, _ in found])
    # A control is ranked among the other controls.
    others = (
        [controls[:i] + controls[i + 1 :] for i in range(len(controls))]
        if repeats == 0
        else [controls] * len(found)
    )
    exposures = np.array(
        [exposure(nats, rest) for (_, nats), rest in zip(found, others, strict=True)]
    )
    return {
        "extracted": share(agreed == 1),
        "score": mean(agreed),
        "exposure_bits": mean(exposures),
        "nats": mean(np.array([nats for _, nats in found])),
    }


def bits_per_byte_by_contamination(
    nats: np.ndarray, sizes: np.ndarray, contaminated: np.ndarray
) -> dict[str, float | None]:
    """Bits per byte of all documents, of the clean and of the contaminated ones: ratios of sums. nats, sizes (bytes): [documents]."""
    parts = {"all": np.ones(len(nats), bool), "clean": ~contaminated, "contaminated": contaminated}
    return {
        name: float(nats[p].sum() / (np.log(2) * sizes[p].sum())) if sizes[p].sum() else None
        for name, p in parts.items()
    }
