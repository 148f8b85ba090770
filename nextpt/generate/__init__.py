"""Decoding: from prompts to text."""

from nextpt.generate.beam import Beams, beam_search
from nextpt.generate.sample import Sampling
from nextpt.generate.text import (
    Continuation,
    Ending,
    Wanted,
    generate,
    pick_device,
    prompt_tokens,
    text_tokens,
)

__all__ = [
    "Beams",
    "Continuation",
    "Ending",
    "Sampling",
    "Wanted",
    "beam_search",
    "generate",
    "pick_device",
    "prompt_tokens",
    "text_tokens",
]
