"""What is kept of generated text: the JSON of a call, and RUN/samples.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import DataError
from nextpt.base.files import atomic_write, canonical_json
from nextpt.generate.sample import Sampling
from nextpt.generate.text import Continuation


def generation_json(
    run: Path,
    step: int | None,
    settings: dict[str, Any],
    prompts: Sequence[str],
    tokenizer: Tokenizer,
    found: Sequence[Continuation],
) -> dict[str, Any]:
    """The form of `nextpt generate --json`. logprob: nats, under the model's own distribution."""
    return {
        "run": str(run),
        "step": step,
        "settings": settings,
        "continuations": [
            {
                "prompt": prompts[c.prompt],
                "prompt_number": c.prompt,
                "sample": c.sample,
                "text": c.text,
                "ending": c.ending,
                "logprob": sum(c.logprobs),
                "tokens": [
                    {"id": token, "token": tokenizer.token(token), "logprob": logprob}
                    for token, logprob in zip(c.tokens, c.logprobs, strict=True)
                ],
            }
            for c in found
        ],
    }


def sample_record(
    step: int, prompt: str, found: Continuation, sampling: Sampling
) -> dict[str, Any]:
    """One entry of RUN/samples.json. text: the continuation, without the prompt."""
    return {"step": step, "prompt": prompt, "sample": found.sample, "text": found.text} | asdict(
        sampling
    )


def save_samples(run: Path, samples: list[dict[str, Any]]) -> None:
    """Add samples to RUN/samples.json; one with the same step, prompt and settings is replaced.

    Raises DataError.
    """
    path = run / "samples.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        new = [{k: v for k, v in s.items() if k != "text"} for s in samples]
        kept = [s for s in kept if {k: v for k, v in s.items() if k != "text"} not in new]
        with atomic_write(path) as file:
            file.write(canonical_json(kept + samples))
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path} cannot be written or holds something else: {error}") from error
