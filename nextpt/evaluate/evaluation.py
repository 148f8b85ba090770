"""Evaluation on documents: metrics per domain, context and token frequency, with intervals."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from nextpt.base.errors import DataError
from nextpt.evaluate.bootstrap import CONFIDENCE, ratio_interval, stratified
from nextpt.evaluate.compressors import compare
from nextpt.evaluate.documents import (
    Window,
    context_lengths,
    harness_windows,
    sliding_windows,
)
from nextpt.evaluate.frequency import EDGES, band_of_tokens
from nextpt.evaluate.loaded_model import LoadedModel
from nextpt.evaluate.metrics import Metrics
from nextpt.evaluate.progress import (
    PartProgress,
    Progress,
    ignore_part_progress,
    ignore_progress,
)
from nextpt.evaluate.ranks import score_on_ranks
from nextpt.evaluate.texts import encode_document

# Columns of a document's sums; those of contexts and bands follow
TOKENS, BYTES, NATS, SPECIAL = range(4)
BANDS = len(EDGES)


@dataclass(frozen=True)
class EvaluationProtocol:
    """How documents are scored.

    Attributes:
        window: Tokens of context; by default the longest that the model has.
        stride: Tokens scored per window after the first; window / 2 by default.
        batch_size: Windows per forward pass.
        ranks: Processes that share the documents.
        resamples: Resamples of the bootstrap.
        seed: Seed of the bootstrap.
        compressors: Also measure general-purpose compressors on the same bytes.
        harness: Also give the metrics of lm-evaluation-harness, by its own windows.
    """

    window: int | None = None
    stride: int | None = None
    batch_size: int = 32
    ranks: int = 1
    resamples: int = 1000
    seed: int = 0
    compressors: bool = False
    harness: bool = False

    def sizes(self, positions: int) -> tuple[int, int]:
        """Return (window, stride) for a model of `positions` positions. Raises DataError."""
        window = positions if self.window is None else self.window
        if not 2 <= window <= positions:
            raise DataError(
                f"window = {window} must be between 2 and the model's {positions} positions"
            )
        stride = window // 2 if self.stride is None else self.stride
        if not 1 <= stride <= window:
            raise DataError(f"stride = {stride} must be between 1 and the window, {window}")
        return window, stride


@dataclass(frozen=True)
class EncodedDomain:
    """Documents of a domain.

    Attributes:
        texts: As they are read.
        tokens: Tokens of each, start and end included.
        sizes: UTF-8 bytes of each target.
    """

    texts: list[str]
    tokens: list[np.ndarray]
    sizes: list[np.ndarray]


def evaluate_model(
    loaded: LoadedModel,
    texts: dict[str, list[str]],
    protocol: EvaluationProtocol,
    *,
    counts: np.ndarray | None = None,
    progress: PartProgress = ignore_part_progress,
) -> dict[str, Any]:
    """Evaluate a model on documents.

    Args:
        loaded: The model.
        texts: Domain -> documents.
        protocol: How they are scored.
        counts: How often each token came in training, int64 [V]; counted in the evaluated text by
            default.
        progress: Gets (domain, share of it that is done).

    Returns:
        What `nextpt eval --json` writes.

    Raises:
        DataError: The protocol does not fit the model, or a document cannot be scored.
    """
    window, stride = protocol.sizes(loaded.model.max_position)
    encoded = _encode(loaded, texts)
    bands = band_of_tokens(_text_counts(encoded, loaded) if counts is None else counts)
    sums = {
        domain: _sums(loaded, documents, protocol, window, stride, bands, partial(progress, domain))
        for domain, documents in encoded.items()
    }
    resampled = dict(
        zip(sums, stratified(list(sums.values()), protocol.resamples, protocol.seed), strict=True)
    )
    total = np.sum([s.sum(axis=0) for s in sums.values()], axis=0)
    total_resampled = np.sum(list(resampled.values()), axis=0)
    domains = {d: _metrics(s.sum(axis=0), resampled[d], len(s)) for d, s in sums.items()}
    if protocol.compressors:
        for domain, documents in texts.items():
            domains[domain]["compressors"] = compare([text.encode() for text in documents])
    result: dict[str, Any] = {
        **loaded.to_json(),
        "window": window,
        "stride": stride,
        "protocol": describe_protocol(loaded, protocol),
        "domains": domains,
        "total": _metrics(total, total_resampled, sum(len(s) for s in sums.values())),
        "by_context": _by_context(total, total_resampled, window),
        "by_frequency": {
            "counted_in": "evaluated text" if counts is None else "training shards",
            "bands": _by_band(total, total_resampled, window),
        },
    }
    if protocol.harness:
        result["harness"] = {
            d: _harness(loaded, documents, protocol) for d, documents in encoded.items()
        }
    return result


def document_sums(
    loaded: LoadedModel, texts: dict[str, list[str]], protocol: EvaluationProtocol
) -> dict[str, np.ndarray]:
    """Score documents as `evaluate_model` does, whose metrics are ratios of these sums.

    Returns:
        Domain -> fp64 [documents, 4], columns TOKENS to SPECIAL: text tokens, bytes, their nats,
        nats of special tokens.

    Raises:
        DataError: The protocol does not fit the model, or a document cannot be scored.
    """
    window, stride = protocol.sizes(loaded.model.max_position)
    no_bands = np.zeros(loaded.tokenizer.vocab_size, dtype=np.int64)
    return {
        domain: _sums(loaded, documents, protocol, window, stride, no_bands, ignore_progress)[
            :, : SPECIAL + 1
        ]
        for domain, documents in _encode(loaded, texts).items()
    }


def _encode(loaded: LoadedModel, texts: dict[str, list[str]]) -> dict[str, EncodedDomain]:
    for domain, documents in texts.items():
        if not any(documents):
            raise DataError(f"all documents of {domain} are empty; there is nothing to score")
    encoded = {}
    for domain, documents in texts.items():
        tokens, sizes = zip(
            *(encode_document(loaded.tokenizer, text) for text in documents), strict=True
        )
        encoded[domain] = EncodedDomain(documents, list(tokens), list(sizes))
    return encoded


def _text_counts(encoded: dict[str, EncodedDomain], loaded: LoadedModel) -> np.ndarray:
    counts = np.zeros(loaded.tokenizer.vocab_size, dtype=np.int64)
    for documents in encoded.values():
        for tokens in documents.tokens:
            counts += np.bincount(tokens, minlength=len(counts))
    return counts


def _buckets(window: int) -> int:
    """Count the buckets of contexts of 1, 2-3, 4-7, ... tokens, up to the window."""
    return window.bit_length()


def _sums(
    loaded: LoadedModel,
    documents: EncodedDomain,
    protocol: EvaluationProtocol,
    window: int,
    stride: int,
    bands: np.ndarray,
    progress: Progress,
) -> np.ndarray:
    """Score a domain's documents.

    Returns:
        fp64 [documents, 4 + 4 buckets + 2 BANDS]: tokens, bytes, nats, special nats, then nats and
        tokens by context bucket, first those of document starts, and by frequency band.
    """
    windows = list(sliding_windows([len(d) for d in documents.tokens], window, stride))
    scores = score_on_ranks(
        loaded,
        documents.tokens,
        windows,
        batch_size=protocol.batch_size,
        ranks=protocol.ranks,
        progress=progress,
    )
    token_bytes = loaded.tokenizer.token_bytes()
    windows_of: list[list[Window]] = [[] for _ in documents.tokens]
    for w in windows:
        windows_of[w.document].append(w)
    rows = []
    for tokens, sizes, nats, own_windows in zip(
        documents.tokens, documents.sizes, scores, windows_of, strict=True
    ):
        targets = tokens[1:]
        text = token_bytes[targets] > 0
        bucket = np.log2(context_lengths(len(tokens), own_windows)).astype(np.int64)
        bucket[own_windows[0].stop :] += _buckets(window)
        band = bands[targets[text]]
        by_group = [
            np.bincount(group, weights, length)
            for group, length in ((bucket[text], 2 * _buckets(window)), (band, BANDS))
            for weights in (nats[text], None)
        ]
        totals = [text.sum(), sizes.sum(dtype=np.int64), nats[text].sum(), nats[~text].sum()]
        rows.append(np.concatenate([totals, *by_group]))
    return np.array(rows)


def _metrics(sums: np.ndarray, resampled: np.ndarray, documents: int) -> dict[str, Any]:
    metrics = Metrics(int(sums[TOKENS]), int(sums[BYTES]), float(sums[NATS]), float(sums[SPECIAL]))
    bits = math.log(2) * resampled[:, BYTES]
    intervals = {
        "nats_per_token": ratio_interval(resampled[:, NATS], resampled[:, TOKENS]),
        "bpb": ratio_interval(resampled[:, NATS], bits),
        "bpb_with_eod": ratio_interval(resampled[:, NATS] + resampled[:, SPECIAL], bits),
    }
    return metrics.as_dict() | {"documents": documents, "intervals": intervals}


def _grouped(
    sums: np.ndarray,
    resampled: np.ndarray,
    first: int,
    count: int,
    edges: list[tuple[float, float]],
) -> list[dict[str, Any]]:
    """Describe groups of tokens; those without a token are left out.

    Args:
        sums: Sums over documents.
        resampled: Resampled sums.
        first: First column of the groups' nats; their tokens are in the `count` columns after.
        count: Number of groups.
        edges: (from, to) of each group.
    """
    return [
        {
            "from": low,
            "to": high,
            "tokens": int(sums[tokens]),
            "nats_per_token": float(sums[nats] / sums[tokens]),
            "interval": ratio_interval(resampled[:, nats], resampled[:, tokens]),
        }
        for nats, tokens, (low, high) in zip(
            range(first, first + count), range(first + count, first + 2 * count), edges, strict=True
        )
        if sums[tokens]
    ]


def _by_context(sums: np.ndarray, resampled: np.ndarray, window: int) -> list[dict[str, Any]]:
    """Describe nats by context length.

    `from`, `to`: tokens before the target that the model saw, the start token included; both ends
    are included. `document_start`: the target is in the first window of its document, so that the
    context is all of the document before it. Later targets have at least window - stride tokens of
    context, wherever in a document they are: the two do not compare.
    """
    edges: list[tuple[float, float]] = [
        (2**b, min(2 ** (b + 1) - 1, window)) for b in range(_buckets(window))
    ]
    count = 2 * len(edges)
    rows = []
    for is_start, first in ((True, 0), (False, len(edges))):
        columns = np.arange(first, first + len(edges)) + SPECIAL + 1
        both = np.concatenate([columns, columns + count])
        rows += [
            row | {"document_start": is_start}
            for row in _grouped(sums[both], resampled[:, both], 0, len(edges), edges)
        ]
    return rows


def _by_band(sums: np.ndarray, resampled: np.ndarray, window: int) -> list[dict[str, Any]]:
    """Describe nats by token frequency.

    `from`, `to`: the token's share of all tokens counted, the upper end not included; both 0: the
    token never occurred.
    """
    edges = [(0.0, 0.0), *itertools.pairwise(EDGES)]
    return _grouped(sums, resampled, SPECIAL + 1 + 4 * _buckets(window), BANDS, edges)


def describe_protocol(loaded: LoadedModel, protocol: EvaluationProtocol) -> dict[str, Any]:
    """Describe everything that decides the metrics, for a reader of the JSON."""
    window, stride = protocol.sizes(loaded.model.max_position)
    tokenizer = loaded.tokenizer
    return {
        "window": window,
        "stride": stride,
        "start_token": {
            "id": tokenizer.start_id,
            "text": tokenizer.token(tokenizer.start_id),
            "scored": False,
        },
        "end_token": {
            "id": tokenizer.end_id,
            "text": tokenizer.token(tokenizer.end_id),
            "scored": "in bpb_with_eod only",
        },
        "documents": (
            "each by itself: a start token, all its tokens, an end token; none sees another"
        ),
        "metrics": "ratios of sums over all documents",
        "intervals": {
            "confidence": CONFIDENCE,
            "method": "percentile bootstrap of documents, each domain by itself",
            "resamples": protocol.resamples,
            "seed": protocol.seed,
        },
        "precision": "fp32, sums in fp64",
        "tokenizer_sha256": tokenizer.sha256,
    }


def _harness(
    loaded: LoadedModel, documents: EncodedDomain, protocol: EvaluationProtocol
) -> dict[str, float]:
    """Compute the metrics of lm-evaluation-harness (lm_eval/api/metrics.py).

    Its windows, its count of words, no end token: word_perplexity = exp(nats / words),
    byte_perplexity = exp(nats / bytes), bits_per_byte = nats / bytes / ln 2. Words are the parts
    that whitespace divides a text into, empty ones at its ends included.
    """
    window = loaded.model.max_position
    tokens = [d[:-1] for d in documents.tokens]
    windows = list(harness_windows([len(d) for d in tokens], window))
    scores = score_on_ranks(
        loaded, tokens, windows, batch_size=protocol.batch_size, ranks=protocol.ranks
    )
    nats = float(sum(s.sum() for s in scores))
    words = sum(len(re.split(r"\s+", text)) for text in documents.texts)
    size = sum(len(text.encode()) for text in documents.texts)
    return {
        "window": window,
        "words": words,
        "bytes": size,
        "word_perplexity": math.exp(min(nats / words, 700.0)),
        "byte_perplexity": math.exp(min(nats / size, 700.0)),
        "bits_per_byte": nats / size / math.log(2),
    }
