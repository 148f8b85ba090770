"""Text generation from prompts: sampling, greedy decoding and beam search."""

from nextpt.generate.beam import BeamSearchConfig, beam_search
from nextpt.generate.sample import Sampling
from nextpt.generate.text import (
    Continuation,
    FinishReason,
    GenerationConfig,
    generate,
    pick_device,
    prompt_tokens,
    text_tokens,
)

__all__ = [
    "BeamSearchConfig",
    "Continuation",
    "FinishReason",
    "GenerationConfig",
    "Sampling",
    "beam_search",
    "generate",
    "pick_device",
    "prompt_tokens",
    "text_tokens",
]
