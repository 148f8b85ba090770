"""From a prompt to text, piece by piece."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from data_prep.files import atomic_write, canonical_json
from data_prep.tokenizer import Tokenizer
from nextpt.config import Config
from nextpt.errors import DataError
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
    growing = GrowingText(tokenizer, tokens)
    for token in continuation(model, tokens, max_tokens=max_tokens, max_position=config.max_position,
                              stop_id=tokenizer.end_id, sampling=sampling, cache=cache):
        yield from growing.add(token)
    yield from growing.rest()


class GrowingText:
    """The text of a growing list of tokens, piece by piece; joined, the pieces are the text after that of the first tokens.

    What a token reads as depends on those before it: decoders take the space off the front of a text, and a character may
    take several tokens. So the tokens of the piece before are decoded again with the new ones.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: list[int]) -> None:
        self._tokenizer, self._tokens = tokenizer, list(tokens)
        self._before, self._shown = 0, len(tokens)  # where the piece before begins, and the tokens whose text was given

    def add(self, token: int) -> Iterator[str]:
        """Take one more token; yields the text that is now whole, if any."""
        self._tokens.append(token)
        if not self._new().endswith("\ufffd"):
            yield from self.rest()

    def rest(self) -> Iterator[str]:
        """Yield what has not been given, whole or not."""
        if text := self._new():
            yield text
            self._before, self._shown = self._shown, len(self._tokens)

    def _new(self) -> str:
        given, text = (self._tokenizer.decode(self._tokens[self._before : stop]) for stop in (self._shown, None))
        if text.startswith(given):
            return text[len(given):]
        # A byte that ends no character makes the decoder of byte tokens take back those before it, which were right.
        return self._tokenizer.decode(self._tokens[self._shown :])


def pick_device() -> torch.device:
    """The GPU when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def sample_record(step: int, prompt: str, text: str, sampling: Sampling) -> dict[str, Any]:
    """One entry of RUN/samples.json. text: the continuation, without the prompt."""
    return {"step": step, "prompt": prompt, "text": text, "temperature": sampling.temperature, "top_k": sampling.top_k,
            "top_p": sampling.top_p, "seed": sampling.seed}


def save_samples(run: Path, samples: list[dict[str, Any]]) -> None:
    """Add samples to RUN/samples.json; one with the same step, prompt and settings is replaced. Raises DataError."""
    path = run / "samples.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        new = [{k: v for k, v in s.items() if k != "text"} for s in samples]
        kept = [s for s in kept if {k: v for k, v in s.items() if k != "text"} not in new]
        with atomic_write(path) as file:
            file.write(canonical_json(kept + samples))
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path} cannot be written or holds something else: {error}") from error
