"""Token-by-token inspection: probability and rank of each token, entropy, alternatives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nextpt.evaluate.calibration import Calibration
from nextpt.evaluate.documents import sliding_windows
from nextpt.evaluate.progress import Progress, ignore_progress
from nextpt.model import Decoder

LOGITS_AT_ONCE = 2**24  # elements; some fp32 copies of them live at a time, 64 MiB each


@dataclass(frozen=True)
class TokenScores:
    """What a model predicted at each of n tokens of a text.

    Attributes:
        ids: The tokens, int64 [n].
        nats: -log P of each, fp64 [n].
        rank: Rank of each by probability, int64 [n]; 1: no token was more probable.
        entropy: Entropy of the distribution, nats, fp64 [n].
        alternatives: Most probable tokens, best first, int64 [n, k].
        alternative_nats: -log P of the alternatives, fp64 [n, k].
    """

    ids: np.ndarray
    nats: np.ndarray
    rank: np.ndarray
    entropy: np.ndarray
    alternatives: np.ndarray
    alternative_nats: np.ndarray


def score_tokens(
    model: Decoder,
    document: np.ndarray,
    *,
    window: int,
    stride: int,
    alternatives: int = 8,
    calibration: Calibration | None = None,
    progress: Progress = ignore_progress,
) -> TokenScores:
    """Score all tokens of a document but the first.

    Args:
        model: In evaluation mode.
        document: Tokens, the start token first.
        window: As of `sliding_windows`.
        stride: As of `sliding_windows`.
        alternatives: Most probable tokens to return at each position.
        calibration: Gets the distribution at every position.
        progress: Gets the share that is done.
    """
    parts: list[tuple[Tensor, ...]] = []
    tokens = torch.from_numpy(document.astype(np.int64))
    at_once = max(1, LOGITS_AT_ONCE // model.vocab_size)
    for w in sliding_windows([len(document)], window, stride):
        hidden_TD = _hidden(model, tokens[w.start : w.stop])[w.first_scored :]
        targets_T = tokens[w.start + w.first_scored + 1 : w.stop + 1].to(hidden_TD.device)
        for first in range(0, len(targets_T), at_once):
            logprobs_NV = _logprobs(model, hidden_TD[first : first + at_once])
            targets_N = targets_T[first : first + at_once]
            parts.append(_scores(logprobs_NV, targets_N, alternatives))
            if calibration is not None:
                calibration.add(logprobs_NV, targets_N)
        progress(w.stop / (len(document) - 1))
    return TokenScores(*(torch.cat(column).numpy() for column in zip(*parts, strict=True)))


def next_tokens(
    model: Decoder, document: np.ndarray, *, window: int, alternatives: int = 8
) -> tuple[float, np.ndarray, np.ndarray]:
    """Predict what follows a document.

    Returns:
        Entropy in nats, the most probable tokens int64 [k], best first, and their nats fp64 [k].
    """
    tokens = torch.from_numpy(document[-window:].astype(np.int64))
    logprobs_NV = _logprobs(model, _hidden(model, tokens)[-1:])
    _, _, _, entropy, ids, nats = _scores(logprobs_NV, logprobs_NV.argmax(-1), alternatives)
    return float(entropy), ids[0].numpy(), nats[0].numpy()


@torch.no_grad()
def _hidden(model: Decoder, tokens: Tensor) -> Tensor:
    device = next(model.parameters()).device
    positions = torch.arange(len(tokens), device=device)
    return model(tokens.unsqueeze(0).to(device), positions.unsqueeze(0)).hidden[0]


@torch.no_grad()
def _logprobs(model: Decoder, hidden_ND: Tensor) -> Tensor:
    return model.lm_head(hidden_ND).float().log_softmax(-1)


def _scores(logprobs_NV: Tensor, targets_N: Tensor, alternatives: int) -> tuple[Tensor, ...]:
    """Return the fields of TokenScores, on the CPU."""
    target_logprobs = logprobs_NV.gather(1, targets_N.unsqueeze(1))
    best, ids = logprobs_NV.topk(min(alternatives, logprobs_NV.shape[1]))
    entropy = torch.special.entr(logprobs_NV.exp()).sum(-1)
    columns = (
        targets_N,
        -target_logprobs.squeeze(1).double(),
        (logprobs_NV > target_logprobs).sum(-1) + 1,
        entropy.double(),
        ids,
        -best.double(),
    )
    return tuple(column.cpu() for column in columns)
