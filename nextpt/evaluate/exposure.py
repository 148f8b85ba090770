"""Free running against teacher forcing: a model's own continuations of held-out text beside the real ones.

A stretch is `prefix` tokens of a document and the `continuation` tokens after them. The model reads
each stretch as it is (real), with its own continuation drawn at temperature 1 (sampled) and with
the most probable tokens (greedy), and each token of each is scored given all before it. Special
tokens are left out of every distribution, so that no continuation ends early.

The loss of sampled tokens is on average the entropy of the distributions they came from, so the gap
real - sampled is

    (nats - entropy on real text)                                     what the model does not know
    of real text: its miscalibration + (entropy on real text - nats on its own text)
    how much surer its own text makes it: the drift of free running

The drift is 0 where the model's text is to the model as real text is. Repeats: the share of a
continuation's 4-grams that came before in it (seq-rep-4 of arXiv 1908.04319).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextpt.base.errors import DataError
from nextpt.evaluate.bootstrap import CONFIDENCE, middle, stratified
from nextpt.evaluate.heldout import encode_document
from nextpt.evaluate.source import Source
from nextpt.generate.decoding import Decoding
from nextpt.generate.sample import Sampling, distribution, draw, randomness
from nextpt.model import Decoder

ARMS = ("real", "sampled", "greedy")
NATS, ENTROPY = range(2)
GRAM = 4
LOGITS_AT_ONCE = 2**24  # elements


@dataclass(frozen=True)
class Exposure:
    """What is measured. prefix, continuation: tokens.

    A quarter of the model's positions and the rest unless given. stretches: of each domain, at
    most. rows: stretches per batch. resamples, seed: of the bootstrap of documents; the seed is
    also that of stretches and samples.
    """

    prefix: int | None = None
    continuation: int | None = None
    stretches: int = 128
    rows: int = 32
    resamples: int = 1000
    seed: int = 0

    def sizes(self, positions: int) -> tuple[int, int]:
        """(prefix, continuation) for a model of so many positions. Raises DataError."""
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
    source: Source,
    texts: dict[str, list[str]],
    wanted: Exposure,
    progress: Callable[[str, float], None] = lambda domain, share: None,
) -> dict[str, Any]:
    """Everything that `nextpt eval --exposure-bias --json` writes. texts: domain -> documents. progress: as of `evaluate_source`.

    Raises DataError, also where no document of a domain is long enough.
    """
    prefix, continuation = wanted.sizes(source.config.max_position)
    sums: dict[str, np.ndarray] = {}
    for number, (domain, documents) in enumerate(texts.items()):
        tokens_NT, document_N = _stretches(
            source, domain, documents, prefix + continuation, wanted, number
        )
        each = []
        for first in range(0, len(tokens_NT), wanted.rows):
            group = torch.from_numpy(tokens_NT[first : first + wanted.rows])
            places = [(number, first + row) for row in range(len(group))]
            each.append(_measured(source, group, prefix, places, wanted.seed))
            progress(domain, (first + len(group)) / len(tokens_NT))
        of_stretch = np.concatenate(each)
        sums[domain] = np.array(
            [of_stretch[document_N == d].sum(axis=0) for d in np.unique(document_N)]
        )
    drawn = dict(
        zip(sums, stratified(list(sums.values()), wanted.resamples, wanted.seed), strict=True)
    )
    total, total_drawn = sum(s.sum(axis=0) for s in sums.values()), sum(drawn.values())
    buckets = _buckets(continuation)
    return {
        ("run" if source.is_run else "model"): str(source.path),
        "step": source.step,
        "protocol": {
            "prefix": prefix,
            "continuation": continuation,
            "seed": wanted.seed,
            "special_tokens": "left out of all distributions",
            "sampled": "temperature 1, nothing cut off",
            "repeats": f"share of {GRAM}-grams of a continuation that came before in it",
            "intervals": {
                "confidence": CONFIDENCE,
                "method": "percentile bootstrap of documents, each domain by itself",
                "resamples": wanted.resamples,
                "seed": wanted.seed,
            },
        },
        "domains": {
            d: _figures(s.sum(axis=0), drawn[d], buckets) | {"documents": len(s)}
            for d, s in sums.items()
        },
        "total": (
            _figures(total, total_drawn, buckets)
            | {"documents": sum(len(s) for s in sums.values())}
        ),
        "by_position": _by_position(total, total_drawn, continuation),
    }


def _buckets(continuation: int) -> int:
    """Positions 1, 2-3, 4-7, ... up to the continuation's last."""
    return continuation.bit_length()


def _stretches(
    source: Source, domain: str, documents: list[str], length: int, wanted: Exposure, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """int64 [stretches, length] that do not overlap, and the document of each, int64 [stretches]."""
    special = source.tokenizer.token_bytes() == 0
    found, of = [], []
    for document, text in enumerate(documents):
        tokens = encode_document(source.tokenizer, text)[0][1:-1].astype(np.int64)
        for start in range(0, len(tokens) - length + 1, length):
            if not special[tokens[start : start + length]].any():
                found.append(tokens[start : start + length])
                of.append(document)
    if not found:
        raise DataError(
            f"no document of {domain} has {length} tokens, prefix and continuation together; ask"
            " for fewer"
        )
    chosen = np.random.default_rng([wanted.seed, number]).permutation(len(found))[
        : wanted.stretches
    ]
    chosen.sort()
    return np.stack(found)[chosen], np.array(of)[chosen]


def _measured(
    source: Source, real_NT: Tensor, prefix: int, places: list[tuple[int, int]], seed: int
) -> np.ndarray:
    """fp64 [stretches, 3 arms x 2 kinds x buckets + 3 + buckets]: nats and entropies by position, repeats, tokens by position."""
    count, model = real_NT.shape[1] - prefix, source.model
    banned = torch.from_numpy(source.tokenizer.token_bytes() == 0)
    banned = torch.nn.functional.pad(
        banned, (0, source.config.model.vocab_size - len(banned)), value=True
    )
    own = [
        continue_freely(
            source, real_NT[:, :prefix], count, banned, Sampling(temperature=t, seed=seed), places
        )
        for t in (1.0, 0.0)
    ]
    rows_NT = [real_NT, *(torch.cat([real_NT[:, :prefix], made], dim=1) for made in own)]
    bucket = np.log2(np.arange(1, count + 1)).astype(np.int64)
    width, parts = _buckets(count), []
    for tokens_NT in rows_NT:
        for kind in _scores(model, tokens_NT, prefix, banned):
            parts.append(np.stack([np.bincount(bucket, row, width) for row in kind]))
    repeats = np.array(
        [[_repeats(row) for row in tokens_NT[:, prefix:].tolist()] for tokens_NT in rows_NT]
    ).T
    return np.concatenate(
        [*parts, repeats, np.tile(np.bincount(bucket, minlength=width), (len(real_NT), 1))], axis=1
    )


def continue_freely(
    source: Source,
    prefixes_NT: Tensor,
    count: int,
    banned_V: Tensor,
    sampling: Sampling,
    places: list[tuple[int, int]],
) -> Tensor:
    """int64 [rows, count] that the model goes on with, without the banned tokens (bool [V]). places: of each row, for its random numbers."""
    decoding = Decoding(
        source.config, source.model, prefixes_NT.tolist(), prefixes_NT.shape[1] + count
    )
    random = [randomness(sampling.seed, *place) for place in places]
    chosen = []
    for made in range(count):
        if made:
            decoding.feed(chosen[-1])
        probabilities = distribution(decoding.logits_BV.masked_fill(banned_V, -torch.inf), sampling)
        chosen.append(
            draw(probabilities, torch.tensor([one.random() for one in random], dtype=torch.float64))
        )
    return torch.stack(chosen, dim=1)


@torch.no_grad()
def _scores(
    model: Decoder, tokens_NT: Tensor, prefix: int, banned_V: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """(nats of each token, entropy of its distribution) after the prefix, fp64 [rows, continuation], both without the banned tokens."""
    device = next(model.parameters()).device
    inputs, targets = tokens_NT[:, :-1].to(device), tokens_NT[:, prefix:].to(device)
    hidden = model(inputs, torch.arange(inputs.shape[1], device=device).expand_as(inputs))[
        :, prefix - 1 :
    ]
    nats, entropy = [], []
    at_once = max(1, LOGITS_AT_ONCE // (hidden.shape[1] * len(banned_V)))
    for some, came in zip(hidden.split(at_once), targets.split(at_once), strict=True):
        logs = (
            model.lm_head(some).float().masked_fill(banned_V.to(device), -torch.inf).log_softmax(-1)
        )
        nats.append(-logs.gather(-1, came.unsqueeze(-1)).squeeze(-1).double())
        entropy.append(torch.special.entr(logs.exp()).sum(-1).double())
    return torch.cat(nats).cpu().numpy(), torch.cat(entropy).cpu().numpy()


def _repeats(tokens: list[int]) -> float:
    grams = list(zip(*(tokens[k:] for k in range(GRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams)


@dataclass(frozen=True)
class _Sums:
    """One vector of `_measured`, or many resampled ones, taken apart.

    The leading axes stay. scores [..., arm, kind, bucket].
    """

    scores: np.ndarray
    repeats: np.ndarray
    tokens: np.ndarray

    @staticmethod
    def of(values: np.ndarray, buckets: int) -> _Sums:
        scores = values[..., : len(ARMS) * 2 * buckets].reshape(
            *values.shape[:-1], len(ARMS), 2, buckets
        )
        return _Sums(scores, values[..., -buckets - len(ARMS) : -buckets], values[..., -buckets:])


def _with_interval(value: np.ndarray, drawn: np.ndarray) -> dict[str, Any]:
    return {"value": float(value), "interval": middle(drawn) if np.ptp(drawn) else None}


def _parts(scores: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """The gap and its two parts. scores [..., arm, kind], tokens [...]."""
    real, own = scores[..., 0, :], scores[..., 1, :]
    parts = {
        "gap": real[..., NATS] - own[..., NATS],
        "miscalibration": real[..., NATS] - real[..., ENTROPY],
        "drift": real[..., ENTROPY] - own[..., NATS],
    }
    return {name: value / tokens for name, value in parts.items()}


def _figures(sums: np.ndarray, drawn: np.ndarray, buckets: int) -> dict[str, Any]:
    one, many = _Sums.of(sums, buckets), _Sums.of(drawn, buckets)
    tokens, tokens_drawn = one.tokens.sum(), many.tokens.sum(axis=-1)
    of_all, of_drawn = one.scores.sum(axis=-1), many.scores.sum(axis=-1)
    stretches, stretches_drawn = one.tokens[0], many.tokens[..., 0]  # each has one first position
    arms = {
        name: {
            "nats_per_token": _with_interval(
                of_all[a, NATS] / tokens, of_drawn[:, a, NATS] / tokens_drawn
            ),
            "entropy": _with_interval(
                of_all[a, ENTROPY] / tokens, of_drawn[:, a, ENTROPY] / tokens_drawn
            ),
            "repeats": _with_interval(
                one.repeats[a] / stretches, many.repeats[:, a] / stretches_drawn
            ),
        }
        for a, name in enumerate(ARMS)
    }
    parts, parts_drawn = _parts(of_all, tokens), _parts(of_drawn, tokens_drawn)
    return {"stretches": int(stretches), "tokens": int(tokens), "arms": arms} | {
        name: _with_interval(value, parts_drawn[name]) for name, value in parts.items()
    }


def _by_position(sums: np.ndarray, drawn: np.ndarray, continuation: int) -> list[dict[str, Any]]:
    """from, to: places in the continuation, from 1, both included."""
    buckets, rows = _buckets(continuation), []
    one, many = _Sums.of(sums, buckets), _Sums.of(drawn, buckets)
    for b in range(buckets):
        tokens, tokens_drawn = one.tokens[b], many.tokens[:, b]
        row: dict[str, Any] = {"from": 2**b, "to": min(2 ** (b + 1) - 1, continuation)}
        for a, name in enumerate(ARMS):
            row[name] = _with_interval(
                one.scores[a, NATS, b] / tokens, many.scores[:, a, NATS, b] / tokens_drawn
            )
        parts = _parts(one.scores[..., b], tokens)
        parts_drawn = _parts(many.scores[..., b], tokens_drawn)
        rows.append(
            row | {name: _with_interval(value, parts_drawn[name]) for name, value in parts.items()}
        )
    return rows
