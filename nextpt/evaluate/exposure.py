"""Exposure bias: free running against teacher forcing on held-out text.

A span is `prefix` tokens of a document and the `continuation` tokens after them. The model reads
each span as it is (real), with its own continuation drawn at temperature 1 (sampled) and with
the most probable tokens (greedy), and each token of each is scored given all before it. Special
tokens are left out of every distribution, so that no continuation ends early.

The loss of sampled tokens is on average the entropy of the distributions they came from, so the gap
real - sampled is

    (nats - entropy on real text)                                     what the model does not know
    of real text: its miscalibration + (entropy on real text - nats on its own text)
    how much more certain its own text makes it: the drift of free running

The drift is 0 where the model's text is to the model as real text is. Repeats: the share of a
continuation's 4-grams that occurred before in it (seq-rep-4 of arXiv 1908.04319).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextpt.base.errors import DataError
from nextpt.evaluate.bootstrap import CONFIDENCE, middle, stratified
from nextpt.evaluate.loaded_model import LoadedModel
from nextpt.evaluate.progress import PartProgress, ignore_part_progress
from nextpt.evaluate.texts import encode_document
from nextpt.generate.decoding import DecodingBatch
from nextpt.generate.sample import Sampling, continuation_rng, distribution, draw
from nextpt.model import Decoder

ARMS = ("real", "sampled", "greedy")
NATS, ENTROPY = range(2)
GRAM = 4
LOGITS_AT_ONCE = 2**24  # elements


@dataclass(frozen=True)
class ExposureProtocol:
    """What is measured.

    Attributes:
        prefix: Tokens of a prefix; by default a quarter of the model's positions.
        continuation: Tokens of a continuation; by default the rest of the positions.
        continuations: Most continuations of each domain.
        batch_size: Spans per batch.
        resamples: Resamples of the bootstrap of documents.
        seed: Seed of the bootstrap, of the spans and of the samples.
    """

    prefix: int | None = None
    continuation: int | None = None
    continuations: int = 128
    batch_size: int = 32
    resamples: int = 1000
    seed: int = 0

    def sizes(self, positions: int) -> tuple[int, int]:
        """Return (prefix, continuation) for a model of `positions` positions. Raises DataError."""
        prefix = (
            self.prefix
            if self.prefix is not None
            else positions // 4
            if self.continuation is None
            else positions - self.continuation
        )
        continuation = self.continuation if self.continuation is not None else positions - prefix
        if prefix < 1 or continuation < GRAM or prefix + continuation > positions:
            raise DataError(
                f"prefix = {prefix} and continuation = {continuation} must be at least 1 and"
                f" {GRAM}, and together at most the model's {positions} positions"
            )
        return prefix, continuation


def exposure_bias(
    loaded: LoadedModel,
    texts: dict[str, list[str]],
    protocol: ExposureProtocol,
    progress: PartProgress = ignore_part_progress,
) -> dict[str, Any]:
    """Measure the exposure bias of a model.

    Args:
        loaded: The model, a Decoder.
        texts: Domain -> documents.
        protocol: What is measured.
        progress: As of `evaluate_model`.

    Returns:
        What `nextpt eval --exposure-bias --json` writes.

    Raises:
        DataError: The protocol does not fit the model, or no document of a domain is long enough.
    """
    prefix, continuation = protocol.sizes(loaded.model.max_position)
    sums: dict[str, np.ndarray] = {}
    for number, (domain, documents) in enumerate(texts.items()):
        tokens_NT, document_N = _spans(
            loaded, domain, documents, prefix + continuation, protocol, number
        )
        parts = []
        for first in range(0, len(tokens_NT), protocol.batch_size):
            group = torch.from_numpy(tokens_NT[first : first + protocol.batch_size])
            seeds = [(number, first + row) for row in range(len(group))]
            parts.append(_measure(loaded, group, prefix, seeds, protocol.seed))
            progress(domain, (first + len(group)) / len(tokens_NT))
        of_span = np.concatenate(parts)
        sums[domain] = np.array(
            [of_span[document_N == d].sum(axis=0) for d in np.unique(document_N)]
        )
    resampled = dict(
        zip(sums, stratified(list(sums.values()), protocol.resamples, protocol.seed), strict=True)
    )
    total = np.sum([s.sum(axis=0) for s in sums.values()], axis=0)
    total_resampled = np.sum(list(resampled.values()), axis=0)
    buckets = _buckets(continuation)
    return {
        **loaded.to_json(),
        "protocol": {
            "prefix": prefix,
            "continuation": continuation,
            "seed": protocol.seed,
            "special_tokens": "left out of all distributions",
            "sampled": "temperature 1, nothing cut off",
            "repeats": f"share of {GRAM}-grams of a continuation that came before in it",
            "intervals": {
                "confidence": CONFIDENCE,
                "method": "percentile bootstrap of documents, each domain by itself",
                "resamples": protocol.resamples,
                "seed": protocol.seed,
            },
        },
        "domains": {
            d: _metrics(s.sum(axis=0), resampled[d], buckets) | {"documents": len(s)}
            for d, s in sums.items()
        },
        "total": (
            _metrics(total, total_resampled, buckets)
            | {"documents": sum(len(s) for s in sums.values())}
        ),
        "by_position": _by_position(total, total_resampled, continuation),
    }


def _buckets(continuation: int) -> int:
    """Count the buckets of positions 1, 2-3, 4-7, ... up to the continuation's last."""
    return continuation.bit_length()


def _spans(
    loaded: LoadedModel,
    domain: str,
    documents: list[str],
    length: int,
    protocol: ExposureProtocol,
    number: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw spans of a domain that do not overlap.

    Returns:
        Tokens, int64 [spans, length], and the document of each, int64 [spans].
    """
    special = loaded.tokenizer.token_bytes() == 0
    spans, document_of = [], []
    for document, text in enumerate(documents):
        tokens = encode_document(loaded.tokenizer, text)[0][1:-1].astype(np.int64)
        for start in range(0, len(tokens) - length + 1, length):
            if not special[tokens[start : start + length]].any():
                spans.append(tokens[start : start + length])
                document_of.append(document)
    if not spans:
        raise DataError(
            f"no document of {domain} has {length} tokens, prefix and continuation together; ask"
            " for fewer"
        )
    rng = np.random.default_rng([protocol.seed, number])
    chosen = rng.permutation(len(spans))[: protocol.continuations]
    chosen.sort()
    return np.stack(spans)[chosen], np.array(document_of)[chosen]


def _measure(
    loaded: LoadedModel, real_NT: Tensor, prefix: int, seeds: list[tuple[int, int]], seed: int
) -> np.ndarray:
    """Score spans as they are and with the model's own continuations.

    Returns:
        fp64 [spans, 3 arms x 2 kinds x buckets + 3 + buckets]: nats and entropies by position,
        repeats, tokens by position.
    """
    count, model = real_NT.shape[1] - prefix, loaded.decoder
    special = torch.from_numpy(loaded.tokenizer.token_bytes() == 0)
    # Logits beyond the tokenizer's vocabulary are no text either
    banned = torch.nn.functional.pad(special, (0, model.vocab_size - len(special)), value=True)
    continuations = [
        continue_freely(
            model, real_NT[:, :prefix], count, banned, Sampling(temperature=t, seed=seed), seeds
        )
        for t in (1.0, 0.0)
    ]
    arms_NT = [real_NT, *(torch.cat([real_NT[:, :prefix], c], dim=1) for c in continuations)]
    bucket = np.log2(np.arange(1, count + 1)).astype(np.int64)
    buckets, parts = _buckets(count), []
    for tokens_NT in arms_NT:
        for kind in _scores(model, tokens_NT, prefix, banned):
            parts.append(np.stack([np.bincount(bucket, row, buckets) for row in kind]))
    repeats = np.array(
        [[_repeats(row) for row in tokens_NT[:, prefix:].tolist()] for tokens_NT in arms_NT]
    ).T
    tokens = np.tile(np.bincount(bucket, minlength=buckets), (len(real_NT), 1))
    return np.concatenate([*parts, repeats, tokens], axis=1)


def continue_freely(
    model: Decoder,
    prefixes_NT: Tensor,
    count: int,
    banned_V: Tensor,
    sampling: Sampling,
    seeds: list[tuple[int, int]],
) -> Tensor:
    """Generate `count` tokens after each prefix, without the banned tokens.

    Args:
        model: In evaluation mode.
        prefixes_NT: Tokens of the prefixes, int64.
        count: Tokens to generate.
        banned_V: Tokens that are never chosen, bool.
        sampling: How tokens are chosen.
        seeds: Two numbers per row that, with the seed, decide its random numbers.

    Returns:
        int64 [rows, count].
    """
    batch = DecodingBatch(model, prefixes_NT.tolist(), prefixes_NT.shape[1] + count)
    rngs = [continuation_rng(sampling.seed, *numbers) for numbers in seeds]
    chosen: list[Tensor] = []
    for position in range(count):
        if position:
            batch.append(chosen[-1])
        probabilities = distribution(batch.logits_BV.masked_fill(banned_V, -torch.inf), sampling)
        uniform = torch.tensor([rng.random() for rng in rngs], dtype=torch.float64)
        chosen.append(draw(probabilities, uniform))
    return torch.stack(chosen, dim=1)


@torch.no_grad()
def _scores(
    model: Decoder, tokens_NT: Tensor, prefix: int, banned_V: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Score the tokens after the prefix, without the banned tokens.

    Returns:
        Nats of each token and entropy of its distribution, fp64 [rows, continuation].
    """
    device = next(model.parameters()).device
    inputs, targets = tokens_NT[:, :-1].to(device), tokens_NT[:, prefix:].to(device)
    positions = torch.arange(inputs.shape[1], device=device).expand_as(inputs)
    hidden = model(inputs, positions).hidden[:, prefix - 1 :]
    banned_V = banned_V.to(device)
    nats, entropy = [], []
    at_once = max(1, LOGITS_AT_ONCE // (hidden.shape[1] * len(banned_V)))
    for first in range(0, len(targets), at_once):
        logits = model.lm_head(hidden[first : first + at_once]).float()
        logprobs = logits.masked_fill(banned_V, -torch.inf).log_softmax(-1)
        of_targets = logprobs.gather(-1, targets[first : first + at_once].unsqueeze(-1))
        nats.append(-of_targets.squeeze(-1).double())
        entropy.append(torch.special.entr(logprobs.exp()).sum(-1).double())
    return torch.cat(nats).cpu().numpy(), torch.cat(entropy).cpu().numpy()


def _repeats(tokens: list[int]) -> float:
    """Share of the 4-grams that occurred before."""
    grams = list(zip(*(tokens[k:] for k in range(GRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams)


@dataclass(frozen=True)
class _Sums:
    """Sums of `_measure`, or many resampled ones, taken apart; leading axes stay.

    Attributes:
        scores: [..., arm, kind, bucket].
        repeats: [..., arm].
        tokens: [..., bucket].
    """

    scores: np.ndarray
    repeats: np.ndarray
    tokens: np.ndarray

    @staticmethod
    def of(values: np.ndarray, buckets: int) -> _Sums:
        shape = (*values.shape[:-1], len(ARMS), 2, buckets)
        scores = values[..., : len(ARMS) * 2 * buckets].reshape(shape)
        return _Sums(scores, values[..., -buckets - len(ARMS) : -buckets], values[..., -buckets:])


def _with_interval(value: np.ndarray, resampled: np.ndarray) -> dict[str, Any]:
    return {"value": float(value), "interval": middle(resampled) if np.ptp(resampled) else None}


def _parts(scores: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Compute the gap and its two parts from scores [..., arm, kind] and tokens [...]."""
    real, own = scores[..., 0, :], scores[..., 1, :]
    parts = {
        "gap": real[..., NATS] - own[..., NATS],
        "miscalibration": real[..., NATS] - real[..., ENTROPY],
        "drift": real[..., ENTROPY] - own[..., NATS],
    }
    return {name: value / tokens for name, value in parts.items()}


def _metrics(sums: np.ndarray, resampled: np.ndarray, buckets: int) -> dict[str, Any]:
    point, draws = _Sums.of(sums, buckets), _Sums.of(resampled, buckets)
    tokens, tokens_drawn = point.tokens.sum(), draws.tokens.sum(axis=-1)
    of_all, of_drawn = point.scores.sum(axis=-1), draws.scores.sum(axis=-1)
    # Each span has one first position
    spans, spans_drawn = point.tokens[0], draws.tokens[..., 0]
    arms = {
        name: {
            "nats_per_token": _with_interval(
                of_all[a, NATS] / tokens, of_drawn[:, a, NATS] / tokens_drawn
            ),
            "entropy": _with_interval(
                of_all[a, ENTROPY] / tokens, of_drawn[:, a, ENTROPY] / tokens_drawn
            ),
            "repeats": _with_interval(point.repeats[a] / spans, draws.repeats[:, a] / spans_drawn),
        }
        for a, name in enumerate(ARMS)
    }
    parts, parts_drawn = _parts(of_all, tokens), _parts(of_drawn, tokens_drawn)
    return {"continuations": int(spans), "tokens": int(tokens), "arms": arms} | {
        name: _with_interval(value, parts_drawn[name]) for name, value in parts.items()
    }


def _by_position(
    sums: np.ndarray, resampled: np.ndarray, continuation: int
) -> list[dict[str, Any]]:
    """Describe nats by position in the continuation.

    `from`, `to`: positions from 1, both included.
    """
    buckets, rows = _buckets(continuation), []
    point, draws = _Sums.of(sums, buckets), _Sums.of(resampled, buckets)
    for b in range(buckets):
        tokens, tokens_drawn = point.tokens[b], draws.tokens[:, b]
        row: dict[str, Any] = {"from": 2**b, "to": min(2 ** (b + 1) - 1, continuation)}
        for a, name in enumerate(ARMS):
            row[name] = _with_interval(
                point.scores[a, NATS, b] / tokens, draws.scores[:, a, NATS, b] / tokens_drawn
            )
        parts = _parts(point.scores[..., b], tokens)
        parts_drawn = _parts(draws.scores[..., b], tokens_drawn)
        rows.append(
            row | {name: _with_interval(value, parts_drawn[name]) for name, value in parts.items()}
        )
    return rows
