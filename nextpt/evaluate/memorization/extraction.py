"""Extraction: does the model continue a span of a document as the document does?

A sequence is a prefix and the `continuation` tokens after it; the model continues the prefix
greedily. Score: the share of those tokens that agree, position by position (arXiv 2304.11158,
section 2); exact: all of them (arXiv 2202.07646); near: at least NEAR of them. The same
continuations are asked for with prefixes of every length, the longer ones reaching further back,
and of held-out documents too: what those score is not memory but prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest, bootstrap
from torch import Tensor

from data_prep.format import PADDING
from nextpt.data.sequences import SequenceSource
from nextpt.evaluate.bootstrap import ratio_interval, stratified
from nextpt.generate.decoding import DecodingBatch
from nextpt.model import Decoder

NEAR = 0.9
BATCH_SIZE = 64  # spans that are continued together
RESAMPLES = 2000  # of the bootstrap
DRAWS = 20  # per span, before it is given up


@dataclass(frozen=True)
class Spans:
    """Spans of documents.

    Attributes:
        tokens: int64 [spans, longest prefix + continuation], each from inside one document.
        continuation: Tokens of the continuation, the last ones.
        domains: Number of the domain of each span, int64 [spans].
        documents: Number of the document of each span, int64 [spans]. Shards do not say which
            pieces are of one document: a piece counts as one, unless `name_documents` knows better.
    """

    tokens: np.ndarray
    continuation: int
    domains: np.ndarray
    documents: np.ndarray


def sample_spans(
    domains: Sequence[SequenceSource],
    counts: Sequence[int],
    length: int,
    continuation: int,
    rng: np.random.Generator,
) -> Spans:
    """Draw spans of each domain evenly from its sequences.

    A sequence is drawn, a piece of a document in it that is long enough, and a start in that.

    Args:
        domains: Sequences of each domain.
        counts: Spans of each domain; fewer are returned when no such piece is found in DRAWS draws
            for each.
        length: Tokens of a span.
        continuation: Those of them that are the continuation.
        rng: Source of the draws.
    """
    spans: list[np.ndarray] = []
    pieces_drawn: list[tuple[int, int, int]] = []
    for number, (sequences, count) in enumerate(zip(domains, counts, strict=True)):
        last = len(spans) + count
        for _ in range(DRAWS * count if len(sequences) else 0):
            index = int(rng.integers(len(sequences)))
            sequence = sequences[index]
            starts = np.cumsum(sequence.doc_lens) - sequence.doc_lens
            pieces = [
                (int(start), int(size))
                for start, size, flags in zip(
                    starts, sequence.doc_lens, sequence.doc_flags, strict=True
                )
                if size >= length and not flags & PADDING
            ]
            if pieces:
                start, size = pieces[int(rng.integers(len(pieces)))]
                first = start + int(rng.integers(size - length + 1))
                spans.append(sequence.tokens[first : first + length].astype(np.int64))
                pieces_drawn.append((number, index, start))
                if len(spans) == last:
                    break
    numbers = {piece: i for i, piece in enumerate(dict.fromkeys(pieces_drawn))}
    return Spans(
        np.stack(spans) if spans else np.zeros((0, length), np.int64),
        continuation,
        np.array([number for number, _, _ in pieces_drawn], np.int64),
        np.array([numbers[piece] for piece in pieces_drawn], np.int64),
    )


def name_documents(spans: Spans, texts: Sequence[Sequence[np.ndarray]]) -> Spans:
    """Return the spans with the documents that hold them.

    Args:
        spans: Those of a split.
        texts: Tokens of every document of each domain. A span that none holds keeps its piece.
    """
    encoded = [[_as_text(tokens) for tokens in domain] for domain in texts]
    firsts = np.cumsum([0, *(len(domain) for domain in encoded)])
    documents = spans.documents + firsts[-1]
    for index, (tokens, domain) in enumerate(zip(spans.tokens, spans.domains, strict=True)):
        span = _as_text(tokens)
        for number, document in enumerate(encoded[domain]):
            if span in document:
                documents[index] = firsts[domain] + number
                break
    return replace(spans, documents=documents)


def _as_text(tokens: np.ndarray) -> str:
    """A string of one character per token, in which Python searches fast."""
    return tokens.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")


def greedy(model: Decoder, prefixes: Tensor, count: int) -> Tensor:
    """Continue prefixes, int64 [rows, length], greedily by `count` tokens: int64 [rows, count]."""
    batch = DecodingBatch(model, prefixes.tolist(), prefixes.shape[1] + count)
    chosen: list[Tensor] = []
    for _ in range(count):
        chosen.append(batch.logits_BV.argmax(-1))
        if len(chosen) < count:
            batch.append(chosen[-1])
    return torch.stack(chosen, dim=1)


def agreement(model: Decoder, spans: Spans, prefix: int) -> np.ndarray:
    """Share of each continuation's tokens that the model generates, fp64 [spans].

    Args:
        model: In evaluation mode.
        spans: The spans.
        prefix: Tokens before the continuation that the model sees.
    """
    shares = [np.zeros(0)]
    count = spans.continuation
    for first in range(0, len(spans.tokens), BATCH_SIZE):
        group = torch.from_numpy(spans.tokens[first : first + BATCH_SIZE])
        generated = greedy(model, group[:, -count - prefix : -count], count)
        shares.append((generated == group[:, -count:]).double().mean(dim=1).numpy())
    return np.concatenate(shares)


@torch.no_grad()
def continuation_nats(model: Decoder, spans: Spans) -> np.ndarray:
    """Nats per token of the continuations, given all tokens before them, fp64 [spans]."""
    device, nats = next(model.parameters()).device, [np.zeros(0)]
    for first in range(0, len(spans.tokens), BATCH_SIZE):
        group = torch.from_numpy(spans.tokens[first : first + BATCH_SIZE]).to(device)
        inputs, targets = group[:, :-1], group[:, -spans.continuation :]
        positions = torch.arange(inputs.shape[1], device=device).expand_as(inputs)
        hidden = model(inputs, positions).hidden[:, -spans.continuation :]
        logprobs = model.lm_head(hidden).float().log_softmax(-1)
        of_targets = logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        nats.append(-of_targets.double().mean(dim=1).cpu().numpy())
    return np.concatenate(nats)


def share(hits: np.ndarray) -> dict[str, Any]:
    """Share of hits, bool [trials], with its 95 % Wilson interval, for JSON."""
    if not len(hits):
        return {"share": None, "low": None, "high": None, "of": 0}
    interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return {
        "share": float(hits.mean()),
        "low": float(interval.low),
        "high": float(interval.high),
        "of": len(hits),
    }


def sums_by_document(values: np.ndarray, spans: Spans, domain: int) -> np.ndarray:
    """Sum values [spans] of a domain by document: fp64 [documents, 2], sums and counts."""
    kept = spans.domains == domain
    _, number = np.unique(spans.documents[kept], return_inverse=True)
    return np.stack([np.bincount(number, values[kept]), np.bincount(number)], axis=1).astype(float)


def mean_by_document(values: np.ndarray, spans: Spans) -> dict[str, Any]:
    """Mean of values [spans] with its 95 % interval, for JSON.

    Whole documents are resampled, each domain by itself: spans of one document are alike, and the
    share of a domain was chosen.
    """
    strata = [sums_by_document(values, spans, domain) for domain in np.unique(spans.domains)]
    resampled = np.sum(stratified(strata, RESAMPLES, 0), axis=0) if strata else np.zeros((1, 2))
    interval = ratio_interval(resampled[:, 0], resampled[:, 1])
    low, high = interval or (None, None)
    return {
        "mean": float(values.mean()) if len(values) else None,
        "low": low,
        "high": high,
        "of": len(values),
    }


def mean(values: np.ndarray) -> dict[str, Any]:
    """Mean of values, fp64 [n], with its 95 % bootstrap interval, for JSON."""
    if len(values) < 2:
        return {
            "mean": float(values[0]) if len(values) else None,
            "low": None,
            "high": None,
            "of": len(values),
        }
    low, high = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", random_state=0
    ).confidence_interval
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "of": len(values)}
