"""Extraction: given a stretch of a document, does the model go on as the document does?

A sequence is a prefix and the `continuation` tokens after it; the model continues the prefix
greedily. Score: the share of those tokens that agree, place by place (arXiv 2304.11158, section 2);
exact: all of them (arXiv 2202.07646); near: at least NEAR of them. The same continuations are asked
for with prefixes of every length, the longer ones reaching further back, and of held-out documents
too: what those score is not memory but prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest, bootstrap
from torch import Tensor

from data_prep.format import PADDING
from nextpt.config import Config
from nextpt.data.sequences import SequenceSource
from nextpt.generate.decoding import Decoding
from nextpt.model import Decoder

NEAR = 0.9
BATCH = 64  # sequences continued at a time


@dataclass(frozen=True)
class Sequences:
    """tokens: int64 [sequences, longest prefix + continuation], each from inside one document."""

    tokens: np.ndarray
    continuation: int


def sample_sequences(
    rows: Sequence[SequenceSource],
    length: int,
    continuation: int,
    count: int,
    chance: np.random.Generator,
) -> Sequences:
    """`count` stretches of `length` tokens, drawn evenly from the rows of all domains: a row, a piece of a document in it that is long enough, a place in that. Fewer when no such piece is found in 20 draws for each."""
    sizes = np.array([len(r) for r in rows], dtype=float)
    found: list[np.ndarray] = []
    for _ in range(20 * count if sizes.sum() else 0):
        domain = rows[int(chance.choice(len(rows), p=sizes / sizes.sum()))]
        row = domain[int(chance.integers(len(domain)))]
        starts = np.cumsum(row.doc_lens) - row.doc_lens
        fits = [
            (s, n)
            for s, n, flags in zip(starts, row.doc_lens, row.doc_flags, strict=True)
            if n >= length and not flags & PADDING
        ]
        if fits:
            start, size = fits[int(chance.integers(len(fits)))]
            at = int(start) + int(chance.integers(int(size) - length + 1))
            found.append(row.tokens[at : at + length].astype(np.int64))
            if len(found) == count:
                break
    return Sequences(np.stack(found) if found else np.zeros((0, length), np.int64), continuation)


def greedy(config: Config, model: Decoder, prefixes: Tensor, count: int) -> Tensor:
    """The `count` most probable tokens one after another, int64 [rows, count], after prefixes int64 [rows, length]."""
    decoding, chosen = Decoding(config, model, prefixes.tolist(), prefixes.shape[1] + count), []
    for _ in range(count):
        chosen.append(decoding.logits_BV.argmax(-1))
        if len(chosen) < count:
            decoding.feed(chosen[-1])
    return torch.stack(chosen, dim=1)


def scores(
    config: Config,
    model: Decoder,
    sequences: Sequences,
    prefix: int,
    advance: Callable[[int], None] = lambda n: None,
) -> np.ndarray:
    """fp64 [sequences]: the share of the continuation's tokens that the model gives after the last `prefix` tokens before it."""
    found = [np.zeros(0)]
    count = sequences.continuation
    for first in range(0, len(sequences.tokens), BATCH):
        group = torch.from_numpy(sequences.tokens[first : first + BATCH])
        given = greedy(config, model, group[:, -count - prefix : -count], count)
        found.append((given == group[:, -count:]).double().mean(dim=1).numpy())
        advance(len(group))
    return np.concatenate(found)


@torch.no_grad()
def continuation_nats(model: Decoder, sequences: Sequences) -> np.ndarray:
    """fp64 [sequences]: nats per token of the continuations, given all that the sequences have before them."""
    device, found = next(model.parameters()).device, [np.zeros(0)]
    for first in range(0, len(sequences.tokens), BATCH):
        group = torch.from_numpy(sequences.tokens[first : first + BATCH]).to(device)
        inputs, targets = group[:, :-1], group[:, -sequences.continuation :]
        hidden = model(inputs, torch.arange(inputs.shape[1], device=device).expand_as(inputs))[
            :, -sequences.continuation :
        ]
        logs = model.lm_head(hidden).float().log_softmax(-1)
        found.append(
            -logs.gather(-1, targets.unsqueeze(-1)).squeeze(-1).double().mean(dim=1).cpu().numpy()
        )
    return np.concatenate(found)


def share(hits: np.ndarray) -> dict[str, Any]:
    """A share and its 95 % interval (Wilson's) of yes and no, bool [trials]."""
    if not len(hits):
        return {"share": None, "low": None, "high": None, "of": 0}
    interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return {
        "share": float(hits.mean()),
        "low": float(interval.low),
        "high": float(interval.high),
        "of": len(hits),
    }


def mean(values: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """A mean and its 95 % interval by bootstrap over the values, fp64 [n]."""
    if len(values) < 2:
        return {
            "mean": float(values[0]) if len(values) else None,
            "low": None,
            "high": None,
            "of": len(values),
        }
    low, high = bootstrap(
        (values,), np.mean, n_resamples=2000, method="percentile", random_state=seed
    ).confidence_interval
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "of": len(values)}
