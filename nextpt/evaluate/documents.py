"""Scoring of whole documents with sliding windows; every token is predicted once.

A document is [start] + tokens + [end]. Windows of `window` inputs move by `stride`; each scores
only the targets that no earlier window scored, so all but those of the first window have at least
window - stride tokens of context.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nextpt.data.batch import IGNORE_INDEX
from nextpt.evaluate.hugging_face import HuggingFaceModel
from nextpt.evaluate.metrics import Metrics
from nextpt.evaluate.progress import Progress, ignore_progress
from nextpt.model import Decoder


@dataclass(frozen=True)
class Window:
    """One forward pass over a part of a document.

    Attributes:
        document: Number of the document.
        start: First input token; inputs are tokens[start:stop], targets tokens[start+1:stop+1].
        stop: End of the inputs.
        first_scored: Offset of the first target that is scored.
    """

    document: int
    start: int
    stop: int
    first_scored: int


def sliding_windows(lengths: list[int], window: int, stride: int) -> Iterator[Window]:
    """Plan windows that predict each of the length - 1 targets of every document exactly once.

    Args:
        lengths: Tokens of each document, start and end included.
        window: Most inputs of a window.
        stride: Inputs by which windows move on.

    Raises:
        ValueError: Unless 1 <= stride <= window.
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
    """Plan windows as lm-evaluation-harness rolls them (context_len 1).

    They are disjoint, except that the last has `window` inputs too. So the last targets of a
    document have more context than `sliding_windows` with stride = window gives them
    (lm_eval/utils.py, get_rolling_token_windows).
    """
    for document, length in enumerate(lengths):
        for scored in range(0, length - 1, window):
            stop = min(scored + window, length - 1)
            start = max(0, stop - window)
            yield Window(document, start, stop, scored - start)


def context_lengths(length: int, windows: Iterable[Window]) -> np.ndarray:
    """Count the tokens that a document's windows show before each target, the start included.

    Args:
        length: Tokens of the document.
        windows: Those of this document.

    Returns:
        int64 [length - 1].
    """
    lengths = np.zeros(length - 1, dtype=np.int64)
    for w in windows:
        lengths[w.start + w.first_scored : w.stop] = np.arange(
            w.first_scored + 1, w.stop - w.start + 1
        )
    return lengths


def score_targets(
    model: Decoder | HuggingFaceModel,
    documents: Sequence[np.ndarray],
    windows: Iterable[Window],
    *,
    batch_size: int = 32,
    progress: Progress = ignore_progress,
) -> list[np.ndarray]:
    """Compute the nats of every target.

    Args:
        model: In evaluation mode.
        documents: Tokens of each document, start and end included.
        windows: Windows over the documents, in any order.
        batch_size: Windows per forward pass; those of similar length share one, so little is
            padded.
        progress: Gets the share of the windows that is done.

    Returns:
        Per document fp64 [len(document) - 1]; 0 for targets that no window scores.
    """
    device = next(model.parameters()).device
    order = sorted(windows, key=lambda w: (w.start - w.stop, w.document, w.start))
    scores = [np.zeros(len(d) - 1) for d in documents]
    with torch.no_grad():
        for first in range(0, len(order), batch_size):
            group = order[first : first + batch_size]
            inputs, targets = _stack(group, documents)
            nats = _nats(model, inputs.to(device), targets.to(device)).cpu().double().numpy()
            for row, w in enumerate(group):
                scored = slice(w.start + w.first_scored, w.stop)
                scores[w.document][scored] = nats[row, w.first_scored : w.stop - w.start]
            progress((first + len(group)) / len(order))
    return scores


def score_documents(
    model: Decoder | HuggingFaceModel,
    documents: Sequence[np.ndarray],
    sizes: Sequence[np.ndarray],
    token_bytes: np.ndarray,
    *,
    window: int,
    stride: int,
    batch_size: int = 32,
    progress: Progress = ignore_progress,
) -> tuple[Metrics, np.ndarray]:
    """Score documents and sum their nats, tokens and bytes.

    Args:
        model: In evaluation mode.
        documents: Tokens of each document, start and end included.
        sizes: Per document the UTF-8 bytes that each target stands for, one entry fewer than
            tokens; all count, also those on an end token.
        token_bytes: Bytes of each token of the vocabulary, [V]; 0: the token is no text.
        window: As of `sliding_windows`.
        stride: As of `sliding_windows`.
        batch_size: As of `score_targets`.
        progress: As of `score_targets`.

    Returns:
        The metrics over all documents, and the nats of the text targets of each, fp64 [documents].
    """
    windows = sliding_windows([len(d) for d in documents], window, stride)
    scores = score_targets(model, documents, windows, batch_size=batch_size, progress=progress)
    is_text = [token_bytes[d[1:]] > 0 for d in documents]
    nats = np.array([float(s[t].sum()) for s, t in zip(scores, is_text, strict=True)])
    special_nats = sum(float(s[~t].sum()) for s, t in zip(scores, is_text, strict=True))
    size = sum(int(of_document.sum(dtype=np.int64)) for of_document in sizes)
    tokens = sum(int(t.sum()) for t in is_text)
    return Metrics(tokens, size, float(nats.sum()), special_nats), nats


def _stack(group: list[Window], documents: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Stack windows as inputs and targets, int64 [rows, longest].

    The padding comes last, so no real token attends to it.
    """
    longest = max(w.stop - w.start for w in group)
    inputs = torch.zeros(len(group), longest, dtype=torch.long)
    targets = torch.full((len(group), longest), IGNORE_INDEX, dtype=torch.long)
    for row, w in enumerate(group):
        tokens = torch.from_numpy(documents[w.document][w.start : w.stop + 1].astype(np.int64))
        inputs[row, : len(tokens) - 1] = tokens[:-1]
        targets[row, w.first_scored : len(tokens) - 1] = tokens[1 + w.first_scored :]
    return inputs, targets


def _nats(model: Decoder | HuggingFaceModel, inputs: Tensor, targets: Tensor) -> Tensor:
    """Compute nats per target [rows, T]; 0 where ignored."""
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    hidden = model(inputs, positions).hidden
    weights = (targets != IGNORE_INDEX).float().flatten()
    output = model.lm_head(hidden.flatten(0, 1), targets.flatten(), weights, 1.0)
    return output.nats.view_as(targets)
