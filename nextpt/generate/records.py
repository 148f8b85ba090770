"""Generated text as JSON: the result of one call, and RUN/samples.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import DataError
from nextpt.base.files import atomic_write, canonical_json
from nextpt.checkpoint.state import WEIGHT
from nextpt.generate.sample import Sampling
from nextpt.generate.text import Continuation


def generation_json(
    model: dict[str, Any],
    settings: dict[str, Any],
    prompts: Sequence[str],
    tokenizer: Tokenizer,
    continuations: Sequence[Continuation],
) -> dict[str, Any]:
    """Describe continuations in the form of `nextpt generate --json`.

    `logprob` is in nats, under the model's own distribution.

    Args:
        model: Which model it was, as `LoadedModel.to_json` returns it.
        settings: How tokens were chosen.
        prompts: The prompts.
        tokenizer: Of the model.
        continuations: What was generated.
    """
    return {
        **model,
        "settings": settings,
        "continuations": [
            {
                "prompt": prompts[c.prompt],
                "prompt_number": c.prompt,
                "sample": c.sample,
                "text": c.text,
                "finish_reason": c.finish_reason,
                "logprob": sum(c.logprobs),
                "tokens": [
                    {"id": token, "token": tokenizer.token(token), "logprob": logprob}
                    for token, logprob in zip(c.tokens, c.logprobs, strict=True)
                ],
            }
            for c in continuations
        ],
    }


def sample_record(
    step: int | None, weights: str, prompt: str, continuation: Continuation, sampling: Sampling
) -> dict[str, Any]:
    """Describe a continuation as one entry of RUN/samples.json; `text` is without the prompt.

    Args:
        step: Step of the run's checkpoint.
        weights: Which of its weights: "weight", or an average such as "ema-0.999".
        prompt: The prompt.
        continuation: What was generated.
        sampling: How tokens were chosen.
    """
    return {
        "step": step,
        "weights": weights,
        "prompt": prompt,
        "sample": continuation.sample,
        "text": continuation.text,
    } | asdict(sampling)


def save_samples(run: Path, samples: list[dict[str, Any]]) -> None:
    """Add samples to RUN/samples.json; those with the same model, prompt and settings are replaced.

    Samples of before 2026-12 do not say their weights, which were those that are trained.

    Raises:
        DataError: The file cannot be written, or holds something else.
    """
    path = run / "samples.json"

    def settings(sample: dict[str, Any]) -> dict[str, Any]:
        return {"weights": WEIGHT} | {key: sample[key] for key in sample if key != "text"}

    try:
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        replaced = [settings(sample) for sample in samples]
        kept = [sample for sample in old if settings(sample) not in replaced]
        with atomic_write(path) as file:
            file.write(canonical_json(kept + samples))
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path} cannot be written or holds something else: {error}") from error
