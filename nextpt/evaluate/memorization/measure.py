"""Memorization report: extraction by prefix length, on training and held-out text, and canaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import DataError
from nextpt.data.mixture import quantise_shares
from nextpt.data.sequences import SequenceSource
from nextpt.evaluate.bootstrap import middle, stratified
from nextpt.evaluate.memorization.canaries import Canary, exposure
from nextpt.evaluate.memorization.extraction import (
    NEAR,
    RESAMPLES,
    Spans,
    agreement,
    continuation_nats,
    mean,
    mean_by_document,
    name_documents,
    sample_spans,
    share,
    sums_by_document,
)
from nextpt.evaluate.progress import PartProgress, ignore_part_progress
from nextpt.model import Decoder


def measure_extraction(
    model: Decoder,
    splits: Mapping[str, Mapping[str, SequenceSource]],
    *,
    prefixes: Sequence[int],
    continuation: int,
    count: int,
    seed: int = 0,
    documents: Mapping[str, Sequence[np.ndarray]] | None = None,
    progress: PartProgress = ignore_part_progress,
) -> dict[str, Any]:
    """Measure how much of its training text a model continues token for token.

    Both splits have as many spans of each domain, in the shares of the training sequences: the
    domains differ far more than the splits do.

    Args:
        model: In evaluation mode.
        splits: "train" and "validation" -> domain -> its sequences.
        prefixes: Lengths of the prefixes, tokens.
        continuation: Tokens of the continuations.
        count: Spans of each split.
        seed: Seed of the choice of spans.
        documents: Domain -> tokens of its held-out documents, for intervals by document; pieces of
            documents count as documents without.
        progress: Gets (split, share of it that is done).

    Returns:
        Split -> "prefixes": {length: exact, near, score}, and "nats_per_token" of the same
        continuations after the longest prefix; and the gap, see `_gap`.

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
    domains = [d for d in splits["train"] if all(len(of.get(d, ())) for of in splits.values())]
    sizes = [len(splits["train"][d]) for d in domains]
    counts = quantise_shares(sizes, count) if domains else ()
    result: dict[str, Any] = {}
    nats: dict[str, np.ndarray] = {}
    drawn: dict[str, Spans] = {}
    for split, sequences in splits.items():
        rng = np.random.default_rng(seed)
        spans = sample_spans([sequences[d] for d in domains], counts, length, continuation, rng)
        if not len(spans.tokens):
            raise DataError(
                f"no document of the {split} side has {length} tokens in one piece; ask for shorter"
                " prefixes or continuations"
            )
        if split == "validation" and documents is not None:
            spans = name_documents(spans, [documents.get(d, ()) for d in domains])
        by_prefix = {}
        for number, prefix in enumerate(prefixes):
            scores = agreement(model, spans, prefix)
            by_prefix[str(prefix)] = {
                "exact": share(scores == 1),
                "near": share(scores >= NEAR),
                "score": mean_by_document(scores, spans),
            }
            progress(split, (number + 1) / len(prefixes))
        drawn[split], nats[split] = spans, continuation_nats(model, spans)
        result[split] = {
            "sequences": len(spans.tokens),
            "documents": len(np.unique(spans.documents)),
            "prefixes": by_prefix,
            "nats_per_token": mean_by_document(nats[split], spans),
        }
    return result | _gap(domains, counts, drawn, nats)


def _gap(
    domains: Sequence[str],
    counts: Sequence[int],
    spans: Mapping[str, Spans],
    nats: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Return held-out less training nats per token: the mean of the domains' gaps, by their counts.

    A domain of which a split has no span is in neither mean. The 95 % interval resamples whole
    documents, each domain of each split by itself.
    """
    shared = [
        n for n in range(len(domains)) if all((of.domains == n).any() for of in spans.values())
    ]
    if not shared:
        return {"gap_nats_per_token": None, "gap_interval": None, "gap_by_domain": {}}
    weights = np.array([counts[n] for n in shared]) / sum(counts[n] for n in shared)
    sums = {
        split: [sums_by_document(nats[split], of, n) for n in shared] for split, of in spans.items()
    }
    means = {
        split: np.array([np.divide(*strata.sum(0)) for strata in of]) for split, of in sums.items()
    }
    by_domain = means["validation"] - means["train"]
    strata = [*sums["validation"], *sums["train"]]
    ratios = np.array([of[:, 0] / of[:, 1] for of in stratified(strata, RESAMPLES, 0)])
    resampled = weights @ (ratios[: len(shared)] - ratios[len(shared) :])
    return {
        "gap_nats_per_token": float(weights @ by_domain),
        "gap_interval": middle(resampled) if np.ptp(resampled) else None,
        "gap_by_domain": {
            domains[n]: {"gap": float(gap), "share": float(weight)}
            for n, gap, weight in zip(shared, by_domain, weights, strict=True)
        },
    }


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
        half = _whole(tokens, length // 2)
        score = agreement(model, half, length - half.continuation)
        nats = continuation_nats(model, _whole(tokens, length - 1)) * (length - 1)
        by_repeats.setdefault(canary.repeats, []).append((float(score[0]), float(nats[0])))
        progress("canaries", (number + 1) / len(canaries))
    controls = [nats for _, nats in by_repeats[0]]
    return {
        str(repeats): _summarize(by_repeats[repeats], controls, repeats)
        for repeats in sorted(by_repeats)
    }


def _whole(tokens: np.ndarray, continuation: int) -> Spans:
    """Return a text [1, T] as a span."""
    return Spans(tokens, continuation, np.zeros(1, np.int64), np.zeros(1, np.int64))


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
