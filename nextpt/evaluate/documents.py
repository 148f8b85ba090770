"""Scoring whole documents: sliding windows, every token predicted once.

A document is [start] + tokens + [end]. Windows of `window` inputs move by `stride`; each scores
only the targets that no earlier window scored, so all but those of the first window have at least
window - stride tokens of context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nextpt.data.batch import IGNORE_INDEX
from nextpt.evaluate.foreign import ForeignModel
from nextpt.evaluate.metrics import Metrics
from nextpt.model import Decoder


@dataclass(frozen=True)
class Window:
    """Inputs tokens[start:stop], targets tokens[start+1:stop+1].

    Targets before `fresh` (an offset) are not scored.
    """

    document: int
    start: int
    stop: int
    fresh: int


def windows(lengths: list[int], window: int, stride: int) -> Iterator[Window]:
    """Windows that predict each of `length - 1` targets of every document exactly once.

    Raises ValueError unless 1 <= stride <= window.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"stride {stride} must be between 1 and the window of {window} tokens")
    for document, length in enumerate(lengths):
        inputs, start, scored = length - 1, 0, 0
        while scored < inputs:
            stop = min(start + window, inputs)
            yield Window(document, start, stop, scored - start)
            scored, start = stop, start + stride


def harness_windows(lengths: list[int], window: int) -> Iterator[Window]:
    """Windows as lm-evaluation-harness rolls them (context_len 1): disjoint, but the last has `window` inputs all the same.

    So the last targets of a document have more context than `windows` with stride = window gives
    them (lm_eval/utils.py, get_rolling_token_windows).
    """
    for document, length in enumerate(lengths):
        for scored in range(0, length - 1, window):
            stop = min(scored + window, length - 1)
            start = max(0, stop - window)
            yield Window(document, start, stop, scored - start)


def contexts(length: int, planned: Iterator[Window] | Sequence[Window]) -> np.ndarray:
    """int64 [length - 1]: tokens before each target of one document that its window shows, the start token among them."""
    found = np.zeros(length - 1, dtype=np.int64)
    for w in planned:
        found[w.start + w.fresh : w.stop] = np.arange(w.fresh + 1, w.stop - w.start + 1)
    return found


def score_targets(
    model: Decoder | ForeignModel,
    documents: Sequence[np.ndarray],
    planned: Iterable[Window],
    *,
    rows: int = 32,
    progress: Callable[[float], None] = lambda share: None,
) -> list[np.ndarray]:
    """Nats of every target: fp64 [len(document) - 1] of each document.

    Targets that no window scores have 0.

    rows: windows per forward pass; windows of like length share one, so little is padded. progress:
    hears the share of the windows that is done.
    """
    device = next(model.parameters()).device
    order = sorted(planned, key=lambda w: (w.start - w.stop, w.document, w.start))
    found = [np.zeros(len(d) - 1) for d in documents]
    with torch.no_grad():
        for first in range(0, len(order), rows):
            group = order[first : first + rows]
            inputs, targets = _stack(group, documents)
            nats = _nats(model, inputs.to(device), targets.to(device)).cpu().double().numpy()
            for row, w in enumerate(group):
                found[w.document][w.start + w.fresh : w.stop] = nats[
                    row, w.fresh : w.stop - w.start
                ]
            progress((first + len(group)) / len(order))
    return found


def score_documents(
    model: Decoder | ForeignModel,
    documents: Sequence[np.ndarray],
    sizes: Sequence[np.ndarray],
    token_bytes: np.ndarray,
    *,
    window: int,
    stride: int,
    rows: int = 32,
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[Metrics, np.ndarray]:
    """Figures over all documents, and nats per document (fp64 [documents], text targets only).

    documents: token arrays, start and end tokens included. sizes: per document the UTF-8 bytes that
    each target stands for, one entry fewer than tokens; they all count, also those on an end token.
    token_bytes [V]: 0 says that a token is no text. rows, progress: as of `score_targets`.
    """
    planned = windows([len(d) for d in documents], window, stride)
    scores = score_targets(model, documents, planned, rows=rows, progress=progress)
    text = [token_bytes[d[1:]] > 0 for d in documents]
    nats = np.array([float(s[t].sum()) for s, t in zip(scores, text, strict=True)])
    ends = sum(float(s[~t].sum()) for s, t in zip(scores, text, strict=True))
    # Every target is scored once
    size = sum(int(of_document.sum(dtype=np.int64)) for of_document in sizes)
    return Metrics(sum(int(t.sum()) for t in text), size, float(nats.sum()), ends), nats


def _stack(
    group: list[Window], documents: Sequence[np.ndarray]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets int64 [rows, longest]; padding comes last, so no real token sees it."""
    longest = max(w.stop - w.start for w in group)
    inputs = torch.zeros(len(group), longest, dtype=torch.long)
    targets = torch.full((len(group), longest), IGNORE_INDEX, dtype=torch.long)
    for row, w in enumerate(group):
        tokens = torch.from_numpy(documents[w.document][w.start : w.stop + 1].astype(np.int64))
        inputs[row, : len(tokens) - 1] = tokens[:-1]
        targets[row, w.fresh : len(tokens) - 1] = tokens[1 + w.fresh :]
    return inputs, targets


def _nats(
    model: Decoder | ForeignModel, inputs: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Per-token nats [rows, T], 0 where ignored."""
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    hidden = model(inputs, positions)
    weights = (targets != IGNORE_INDEX).float().flatten()
    output = model.lm_head(hidden.flatten(0, 1), targets.flatten(), weights, 1.0)
    return output.nats.view_as(targets)
