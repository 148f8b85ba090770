"""Evaluating a model on documents: figures per domain, by context and by token frequency, with intervals and the protocol."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from nextpt.base.errors import DataError
from nextpt.evaluate.bootstrap import CONFIDENCE, ratio_interval, stratified
from nextpt.evaluate.compressors import compare
from nextpt.evaluate.documents import Window, contexts, harness_windows, windows
from nextpt.evaluate.frequency import EDGES, band_of_tokens
from nextpt.evaluate.heldout import encode_document
from nextpt.evaluate.metrics import Metrics
from nextpt.evaluate.ranks import score_on_ranks
from nextpt.evaluate.source import Source

# Columns of a document's sums; those of contexts and bands follow
TOKENS, BYTES, NATS, SPECIAL = range(4)
BANDS = len(EDGES)


@dataclass(frozen=True)
class Protocol:
    """How documents are scored. window: tokens of context, the longest the model has unless given. stride: tokens scored per window after the first, window / 2 unless given. rows: windows per forward pass. ranks: processes that share the documents. resamples, seed: of the bootstrap. compressors: also measure general-purpose ones on the same bytes. harness: also give the metrics of lm-evaluation-harness, by its own windows."""

    window: int | None = None
    stride: int | None = None
    rows: int = 32
    ranks: int = 1
    resamples: int = 1000
    seed: int = 0
    compressors: bool = False
    harness: bool = False

    def sizes(self, positions: int) -> tuple[int, int]:
        """(window, stride) for a model of so many positions. Raises DataError."""
        window = self.window or positions
        if not 2 <= window <= positions:
            raise DataError(
                f"window = {window} must be between 2 and the model's {positions} positions"
            )
        stride = self.stride or window // 2
        if not 1 <= stride <= window:
            raise DataError(f"stride = {stride} must be between 1 and the window, {window}")
        return window, stride


@dataclass(frozen=True)
class Encoded:
    """A domain's documents: texts, token arrays with start and end, and the bytes of each target."""

    texts: list[str]
    tokens: list[np.ndarray]
    sizes: list[np.ndarray]


def evaluate_source(
    source: Source,
    texts: dict[str, list[str]],
    protocol: Protocol,
    *,
    counts: np.ndarray | None = None,
    progress: Callable[[str, float], None] = lambda domain, share: None,
) -> dict[str, Any]:
    """Everything that `nextpt eval --json` writes. texts: domain -> documents.

    counts: int64 [V], how often each token came in training; those of the evaluated text unless
    given. progress: hears (domain, share of it that is done). Raises DataError.
    """
    window, stride = protocol.sizes(source.config.max_position)
    encoded = _encode(source, texts)
    bands = band_of_tokens(_text_counts(encoded, source) if counts is None else counts)
    sums = {
        domain: _sums(source, documents, protocol, window, stride, bands, partial(progress, domain))
        for domain, documents in encoded.items()
    }
    drawn = dict(
        zip(sums, stratified(list(sums.values()), protocol.resamples, protocol.seed), strict=True)
    )
    total, total_drawn = sum(s.sum(axis=0) for s in sums.values()), sum(drawn.values())
    domains = {d: _figures(s.sum(axis=0), drawn[d], len(s)) for d, s in sums.items()}
    if protocol.compressors:
        for domain, documents in texts.items():
            domains[domain]["compressors"] = compare([text.encode() for text in documents])
    result: dict[str, Any] = {
        ("run" if source.is_run else "model"): str(source.path),
        "step": source.step,
        "window": window,
        "stride": stride,
        "protocol": describe_protocol(source, protocol),
        "domains": domains,
        "total": _figures(total, total_drawn, sum(len(s) for s in sums.values())),
        "by_context": _by_context(total, total_drawn, window),
        "by_frequency": {
            "counted_in": "evaluated text" if counts is None else "training shards",
            "bands": _by_band(total, total_drawn, window),
        },
    }
    if protocol.harness:
        result["harness"] = {
            d: _harness(source, documents, protocol) for d, documents in encoded.items()
        }
    return result


def document_sums(
    source: Source, texts: dict[str, list[str]], protocol: Protocol
) -> dict[str, np.ndarray]:
    """Domain -> fp64 [documents, 4]: text tokens, bytes, their nats, nats of special tokens.

    The columns TOKENS to SPECIAL.

    They are scored as `evaluate_source` does, and are what its figures are ratios of. Raises
    DataError.
    """
    window, stride = protocol.sizes(source.config.max_position)
    unused = np.zeros(source.tokenizer.vocab_size, dtype=np.int64)
    return {
        domain: _sums(source, documents, protocol, window, stride, unused, lambda share: None)[
            :, : SPECIAL + 1
        ]
        for domain, documents in _encode(source, texts).items()
    }


def _encode(source: Source, texts: dict[str, list[str]]) -> dict[str, Encoded]:
    for domain, documents in texts.items():
        if not any(documents):
            raise DataError(f"all documents of {domain} are empty; there is nothing to score")
    found = {}
    for domain, documents in texts.items():
        tokens, sizes = zip(
            *(encode_document(source.tokenizer, text) for text in documents), strict=True
        )
        found[domain] = Encoded(documents, list(tokens), list(sizes))
    return found


def _text_counts(encoded: dict[str, Encoded], source: Source) -> np.ndarray:
    size = source.tokenizer.vocab_size
    return sum(
        np.bincount(tokens, minlength=size)
        for documents in encoded.values()
        for tokens in documents.tokens
    )


def _buckets(window: int) -> int:
    """Contexts of 1, 2-3, 4-7, ... tokens, up to the window."""
    return window.bit_length()


def _sums(
    source: Source,
    documents: Encoded,
    protocol: Protocol,
    window: int,
    stride: int,
    bands: np.ndarray,
    progress: Callable[[float], None],
) -> np.ndarray:
    """fp64 [documents, 4 + 2 buckets + 2 BANDS]: tokens, bytes, nats, special nats, then nats and tokens by context and by band."""
    planned = list(windows([len(d) for d in documents.tokens], window, stride))
    scores = score_on_ranks(
        source,
        documents.tokens,
        planned,
        rows=protocol.rows,
        ranks=protocol.ranks,
        progress=progress,
    )
    token_bytes = source.tokenizer.token_bytes()
    own: list[list[Window]] = [[] for _ in documents.tokens]
    for w in planned:
        own[w.document].append(w)
    found = []
    for tokens, sizes, nats, of_document in zip(
        documents.tokens, documents.sizes, scores, own, strict=True
    ):
        targets = tokens[1:]
        text = token_bytes[targets] > 0
        bucket = np.log2(contexts(len(tokens), of_document)[text]).astype(np.int64)
        band = bands[targets[text]]
        found.append(
            np.concatenate(
                [
                    [text.sum(), sizes.sum(dtype=np.int64), nats[text].sum(), nats[~text].sum()],
                    *(
                        np.bincount(place, weights, length)
                        for place, length in ((bucket, _buckets(window)), (band, BANDS))
                        for weights in (nats[text], None)
                    ),
                ]
            )
        )
    return np.array(found)


def _figures(sums: np.ndarray, drawn: np.ndarray, documents: int) -> dict[str, Any]:
    figures = Metrics(int(sums[TOKENS]), int(sums[BYTES]), float(sums[NATS]), float(sums[SPECIAL]))
    bits, paid = math.log(2) * drawn[:, BYTES], drawn[:, NATS] + drawn[:, SPECIAL]
    intervals = {
        "nats_per_token": ratio_interval(drawn[:, NATS], drawn[:, TOKENS]),
        "bpb": ratio_interval(drawn[:, NATS], bits),
        "bpb_with_eod": ratio_interval(paid, bits),
    }
    return figures.as_dict() | {"documents": documents, "intervals": intervals}


def _rows(
    sums: np.ndarray, drawn: np.ndarray, first: int, count: int, edges: list[tuple[float, float]]
) -> list[dict[str, Any]]:
    """Nats in columns first.., tokens in the `count` columns after.

    Rows without a token are left out.
    """
    return [
        {
            "from": low,
            "to": high,
            "tokens": int(sums[tokens]),
            "nats_per_token": float(sums[nats] / sums[tokens]),
            "interval": ratio_interval(drawn[:, nats], drawn[:, tokens]),
        }
        for nats, tokens, (low, high) in zip(
            range(first, first + count), range(first + count, first + 2 * count), edges, strict=True
        )
        if sums[tokens]
    ]


def _by_context(sums: np.ndarray, drawn: np.ndarray, window: int) -> list[dict[str, Any]]:
    """from, to: tokens before the target that the model saw, the start token among them, both included."""
    edges = [(2**b, min(2 ** (b + 1) - 1, window)) for b in range(_buckets(window))]
    return _rows(sums, drawn, SPECIAL + 1, len(edges), edges)


def _by_band(sums: np.ndarray, drawn: np.ndarray, window: int) -> list[dict[str, Any]]:
    """from, to: the token's share of all tokens counted, the upper end not included.

    Both 0: it never came.
    """
    return _rows(
        sums,
        drawn,
        SPECIAL + 1 + 2 * _buckets(window),
        BANDS,
        [(0.0, 0.0), *zip(EDGES[:-1], EDGES[1:], strict=True)],
    )


def describe_protocol(source: Source, protocol: Protocol) -> dict[str, Any]:
    """What decides the figures, for a reader of the JSON."""
    window, stride = protocol.sizes(source.config.max_position)
    tokenizer = source.tokenizer
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
        "figures": "ratios of sums over all documents",
        "intervals": {
            "confidence": CONFIDENCE,
            "method": "percentile bootstrap of documents, each domain by itself",
            "resamples": protocol.resamples,
            "seed": protocol.seed,
        },
        "precision": "fp32, sums in fp64",
        "tokenizer_sha256": tokenizer.sha256,
    }


def _harness(source: Source, documents: Encoded, protocol: Protocol) -> dict[str, float]:
    """The metrics of lm-evaluation-harness (lm_eval/api/metrics.py): its windows, its count of words, no end token.

    word_perplexity = exp(nats / words), byte_perplexity = exp(nats / bytes), bits_per_byte = nats /
    bytes / ln 2. Words are the parts that whitespace divides a text into, empty ones at its ends
    included.
    """
    window = source.config.max_position
    tokens = [d[:-1] for d in documents.tokens]
    planned = list(harness_windows([len(d) for d in tokens], window))
    scores = score_on_ranks(source, tokens, planned, rows=protocol.rows, ranks=protocol.ranks)
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
