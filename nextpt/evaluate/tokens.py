"""What a model expected at each place of a text: the probability and rank of what came, the entropy, the alternatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nextpt.evaluate.calibration import Calibration
from nextpt.evaluate.documents import windows
from nextpt.model import Decoder

LOGITS_AT_ONCE = 2**24  # elements; some copies of them in fp32 live at a time, 64 MiB each


@dataclass(frozen=True)
class TokenScores:
    """Of n tokens. ids int64 [n]. nats fp64 [n]: -log P. rank int64 [n]: 1 when no token was more probable. entropy fp64 [n]: of the distribution, nats. alternatives int64 [n, k]: most probable tokens, best first, and alternative_nats fp64 [n, k]."""

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
    progress: Callable[[float], None] = lambda share: None,
) -> TokenScores:
    """Figures of all tokens of a document but the first, which starts it.

    window, stride: tokens of context and scored per window, as of `windows`. calibration: hears
    every place. progress: hears the share that is done.
    """
    parts: list[tuple[Tensor, ...]] = []
    tokens = torch.from_numpy(document.astype(np.int64))
    for w in windows([len(document)], window, stride):
        hidden_TD = _hidden(model, tokens[w.start : w.stop])[w.fresh :]
        targets = tokens[w.start + w.fresh + 1 : w.stop + 1]
        at_once = max(1, LOGITS_AT_ONCE // model.lm_head.weight.shape[0])
        for some, came in zip(
            hidden_TD.split(at_once), targets.to(hidden_TD.device).split(at_once), strict=True
        ):
            logprobs_NV = _logprobs(model, some)
            parts.append(_figures(logprobs_NV, came, alternatives))
            if calibration is not None:
                calibration.add(logprobs_NV, came)
        progress(w.stop / (len(document) - 1))
    return TokenScores(*(torch.cat(column).numpy() for column in zip(*parts, strict=True)))


def next_tokens(
    model: Decoder, document: np.ndarray, *, window: int, alternatives: int = 8
) -> tuple[float, np.ndarray, np.ndarray]:
    """What comes after a document: entropy in nats, the most probable tokens int64 [k], best first, and their nats fp64 [k]."""
    tokens = torch.from_numpy(document[-window:].astype(np.int64))
    logprobs_NV = _logprobs(model, _hidden(model, tokens)[-1:])
    _, _, _, entropy, ids, nats = _figures(logprobs_NV, logprobs_NV.argmax(-1), alternatives)
    return float(entropy), ids[0].numpy(), nats[0].numpy()


@torch.no_grad()
def _hidden(model: Decoder, tokens: Tensor) -> Tensor:
    device = next(model.parameters()).device
    return model(
        tokens.unsqueeze(0).to(device), torch.arange(len(tokens), device=device).unsqueeze(0)
    )[0]


@torch.no_grad()
def _logprobs(model: Decoder, hidden_ND: Tensor) -> Tensor:
    return model.lm_head(hidden_ND).float().log_softmax(-1)


def _figures(logprobs_NV: Tensor, targets_N: Tensor, alternatives: int) -> tuple[Tensor, ...]:
    """The fields of TokenScores, on the CPU."""
    came = logprobs_NV.gather(1, targets_N.unsqueeze(1))
    best, ids = logprobs_NV.topk(min(alternatives, logprobs_NV.shape[1]))
    entropy = torch.special.entr(logprobs_NV.exp()).sum(-1)
    found = (
        targets_N,
        -came.squeeze(1).double(),
        (logprobs_NV > came).sum(-1) + 1,
        entropy.double(),
        ids,
        -best.double(),
    )
    return tuple(column.cpu() for column in found)
