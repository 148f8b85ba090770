"""Sampling one continuation with a key-value cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nextpt.errors import UserError
from nextpt.model import Decoder, KVCache


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0: the most probable one (greedy).

    top_k keeps the k most probable tokens; top_p the smallest set whose probability reaches p (arXiv 1904.09751),
    both after the temperature, in this order.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature = {self.temperature} must be >= 0 (0: greedy)")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k = {self.top_k} must be >= 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p} must be above 0 and at most 1")


def distribution(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities fp64 [V] that tokens are drawn from. Greedy is all on the arg-max."""
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits_V.argmax(), logits_V.numel()).double()
    scaled = logits_V.double() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scaled.numel():
        kept = torch.full_like(scaled, -torch.inf)
        values, places = scaled.topk(sampling.top_k)
        scaled = kept.scatter(0, places, values)
    probabilities = scaled.softmax(0)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, places = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered
        ordered = torch.where(before < sampling.top_p, ordered, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(0, places, ordered)
        probabilities /= probabilities.sum()
    return probabilities


@torch.no_grad()
def continuation(model: Decoder, prompt: list[int], *, max_tokens: int, max_position: int, stop_id: int,
                 sampling: Sampling, cache: KVCache) -> Iterator[int]:
    """Yield up to `max_tokens` tokens after `prompt` (which starts with the start-of-document token).

    Stops before `stop_id` (end of document), and at `max_position`, the longest sequence of the model.
    Raises UserError when the prompt leaves no room. `cache`: empty, for one row.
    """
    if len(prompt) >= max_position:
        raise UserError(f"the prompt has {len(prompt)} tokens; the model's positions end at {max_position}: shorten it")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(sampling.seed)
    new = torch.tensor([prompt], device=device)
    for _ in range(min(max_tokens, max_position - len(prompt))):
        positions = torch.arange(cache.length, cache.length + new.shape[1], device=device).unsqueeze(0)
        hidden = model(new, positions, cache=cache)
        probabilities = distribution(model.lm_head(hidden[0, -1]).float().cpu(), sampling)
        token = int(torch.multinomial(probabilities, 1, generator=generator))
        if token == stop_id:
            return
        yield token
        new = torch.tensor([[token]], device=device)
