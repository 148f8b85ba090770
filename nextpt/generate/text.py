"""From a prompt to text, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from data_prep.tokenizer import Tokenizer
from nextpt.config import Config
from nextpt.generate.sample import Sampling, continuation
from nextpt.model import Decoder, KVCache


def generate_text(config: Config, model: Decoder, tokenizer: Tokenizer, prompt: str, *, max_tokens: int,
                  sampling: Sampling) -> Iterator[str]:
    """Yield the continuation of `prompt` as it grows; ends at the end of the document or after `max_tokens` tokens.

    A character whose bytes are spread over several tokens comes when it is whole. Raises UserError when the prompt
    leaves no room.
    """
    tokens = [tokenizer.start_id, *tokenizer.encode(prompt).tolist()]
    parameter = next(model.parameters())
    capacity = min(len(tokens) + max_tokens, config.max_position)
    cache = KVCache.empty(config, 1, max(capacity, len(tokens)), dtype=parameter.dtype, device=parameter.device)
    new: list[int] = []
    shown = ""
    for token in continuation(model, tokens, max_tokens=max_tokens, max_position=config.max_position,
                              stop_id=tokenizer.end_id, sampling=sampling, cache=cache):
        new.append(token)
        text = tokenizer.decode(new)
        if text.endswith("\ufffd"):
            continue
        yield text[len(shown):]
        shown = text
    text = tokenizer.decode(new)
    if text != shown:
        yield text[len(shown):]


def pick_device() -> torch.device:
    """The GPU when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
