"""Sampling of the next token: temperature, top-k, top-p, min-p, repetition penalty, the draw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nextpt.base.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    The penalty is applied first, then the temperature, top-k, top-p and min-p in this order.

    Attributes:
        temperature: Divides the logits; 0: the most probable token (greedy).
        top_k: Keep the k most probable tokens.
        top_p: Keep the smallest set whose probability reaches p (arXiv 1904.09751).
        min_p: Keep tokens of at least p times the largest probability (arXiv 2407.01082).
        repetition_penalty: Logits of tokens that occurred before are divided by it where positive
            and multiplied where negative (CTRL, arXiv 1909.05858, section 4.1, divides them all,
            which favours tokens of negative logit).
        seed: Seed of the draws.

    Raises:
        UserError: A value is out of bounds.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature = {self.temperature} must be >= 0 (0: greedy)")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k = {self.top_k} must be >= 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p} must be above 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"min_p = {self.min_p} must be at least 0 and at most 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(
                f"repetition_penalty = {self.repetition_penalty} must be above 0 (1: none)"
            )
        if self.seed < 0:
            raise UserError(f"seed = {self.seed} must be >= 0")


def distribution(logits_BV: Tensor, sampling: Sampling, seen_BV: Tensor | None = None) -> Tensor:
    """Compute the probabilities that tokens are drawn from.

    Args:
        logits_BV: Logits of the next token.
        sampling: How the token is chosen. Greedy puts all probability on the first arg-max.
        seen_BV: True for tokens that occurred before; required where there is a penalty.

    Returns:
        Probabilities, fp64 [B, V].
    """
    scaled = logits_BV.double()
    if sampling.repetition_penalty != 1:
        assert seen_BV is not None
        penalty = sampling.repetition_penalty
        scaled = torch.where(
            seen_BV, torch.where(scaled > 0, scaled / penalty, scaled * penalty), scaled
        )
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(scaled.argmax(-1), scaled.shape[-1]).double()
    # A small temperature would overflow large logits
    scaled = scaled - scaled.amax(-1, keepdim=True)
    probabilities = (scaled / sampling.temperature).softmax(-1)
    if sampling.top_k is not None and sampling.top_k < scaled.shape[-1]:
        values, indices = probabilities.topk(sampling.top_k)
        probabilities = _renormalised(torch.zeros_like(probabilities).scatter(-1, indices, values))
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, indices = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        kept = torch.where(before < sampling.top_p, ordered, 0.0)
        probabilities = _renormalised(torch.zeros_like(probabilities).scatter(-1, indices, kept))
    if sampling.min_p:
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = _renormalised(torch.where(probabilities >= least, probabilities, 0.0))
    return probabilities


def _renormalised(probabilities: Tensor) -> Tensor:
    return probabilities / probabilities.sum(-1, keepdim=True)


def draw(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Draw one token per row by inversion of the cumulative distribution.

    Unlike torch.multinomial, a row's token depends on its own random number alone, whatever else is
    in the batch.

    Args:
        probabilities_BV: fp64 [B, V].
        uniform_B: One number of [0, 1) per row, fp64 [B].

    Returns:
        Tokens, int64 [B]: where the cumulative probability first exceeds the number.
    """
    cumulative = probabilities_BV.cumsum(-1)
    total = cumulative[:, -1]
    # The sum is 1 but for rounding
    reached = torch.minimum(uniform_B * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, reached.unsqueeze(-1), right=True).squeeze(-1)


def continuation_rng(seed: int, prompt: int, sample: int) -> np.random.Generator:
    """Random numbers of one continuation, independent of the batch that it is decoded in."""
    return np.random.default_rng([seed, prompt, sample])
