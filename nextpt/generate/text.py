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
