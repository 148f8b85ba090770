"""Speed of generation, and agreement of its log-probabilities with the training forward pass.

    python -m bench.generation --run runs/demo [--rounds 3] [--json FILE]

Speed: tokens per second of whole continuations of one prompt, 200 tokens each, the median over the
rounds, loading left out. Difference: the largest over all tokens of continuations of prompts of
unlike length, greedy, alone and in one left-padded batch; and whether the tokens are the same.
Frequencies: the p-value of the chi-squared test over 1e5 draws after one prompt.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy.stats import chisquare

from data_prep.tokenizer import Tokenizer
from kernels.bench.machine import describe_machine, write_json
from nextpt.evaluate.loaded_model import open_model
from nextpt.evaluate.tokens import score_tokens
from nextpt.generate import (
    Continuation,
    GenerationConfig,
    Sampling,
    generate,
    pick_device,
    prompt_tokens,
)
from nextpt.generate.decoding import DecodingBatch
from nextpt.generate.sample import continuation_rng, distribution, draw
from nextpt.model import Decoder

PROMPTS = (
    "def read_config(path):\n",
    "",
    "import",
    "This module provides",
    "class A:\n    def __init__(self",
    "x",
    "for i in range(",
    "# ",
)
WIDE = PROMPTS[3]  # with many likely continuations
TOKENS, DRAWS = 200, 100_000
SETTINGS: dict[str, dict[str, Any]] = {
    "temperature 0.7": {"temperature": 0.7},
    "top-k 40": {"top_k": 40},
    "top-p 0.9": {"top_p": 0.9},
    "min-p 0.05": {"min_p": 0.05},
}
Opened = tuple[Decoder, Tokenizer]


def speed(opened: Opened, rows: int, rounds: int) -> float:
    """Return the median tokens per second of `rows` continuations decoded together."""
    prompt = prompt_tokens(*opened, PROMPTS[0])
    rates = []
    for seed in range(rounds):
        begun = time.monotonic()
        continuations = list(
            generate(
                *opened,
                [prompt],
                GenerationConfig(Sampling(seed=seed), TOKENS, samples=rows, batch_size=rows),
            )
        )
        rates.append(sum(len(c.tokens) for c in continuations) / (time.monotonic() - begun))
    return median(rates)


def difference(opened: Opened, continuations: list[Continuation]) -> float:
    """Return the largest difference, in nats, between generation and one pass over the text."""
    model, tokenizer = opened
    worst = 0.0
    for prompt, c in zip(PROMPTS, continuations, strict=True):
        document = np.array([*prompt_tokens(model, tokenizer, prompt), *c.tokens])
        nats = score_tokens(
            model, document, window=model.max_position, stride=model.max_position
        ).nats[-len(c.tokens) :]
        worst = max(worst, float(np.abs(nats + np.array(c.logprobs)).max()))
    return worst


def agreement(opened: Opened) -> dict[str, Any]:
    """Compare greedy continuations alone, in a batch, and with one pass over the text."""
    prompts = [prompt_tokens(*opened, prompt) for prompt in PROMPTS]
    alone, together = (
        list(
            generate(
                *opened, prompts, GenerationConfig(Sampling(temperature=0), TOKENS, batch_size=size)
            )
        )
        for size in (1, len(PROMPTS))
    )
    return {
        "tokens": sum(len(c.tokens) for c in alone),
        "same_tokens": [c.tokens for c in alone] == [c.tokens for c in together],
        "largest_difference_alone": difference(opened, alone),
        "largest_difference_together": difference(opened, together),
    }


def chi_squared(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the p-value of drawn counts [V] against exact probabilities [V].

    Tokens expected fewer than 5 times share a cell.
    """
    expected = probabilities * counts.sum()
    common = expected >= 5  # as the approximation needs
    observed, pooled = (np.append(x[common], x[~common].sum()) for x in (counts, expected))
    cells = pooled > 0
    return float(
        chisquare(
            observed[cells], pooled[cells] * (observed[cells].sum() / pooled[cells].sum())
        ).pvalue
    )


def frequencies(opened: Opened) -> dict[str, float]:
    """Return the p-value of each setting."""
    model, tokenizer = opened
    logits = DecodingBatch(
        model, [prompt_tokens(model, tokenizer, WIDE)], model.max_position
    ).logits_BV
    p_values = {}
    for name, settings in SETTINGS.items():
        exact = distribution(logits, Sampling(**settings))
        uniform = torch.from_numpy(continuation_rng(0, 0, 0).random(DRAWS))
        tokens = torch.cat(
            [draw(exact.expand(len(part), -1), part) for part in uniform.split(1000)]
        )
        p_values[name] = chi_squared(
            np.bincount(tokens.numpy(), minlength=exact.shape[1]), exact[0].numpy()
        )
    return p_values


def main() -> None:
    """Measure a run, print, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = pick_device()
    loaded = open_model(arguments.run, None, device)
    opened = (loaded.decoder, loaded.tokenizer)
    result = {
        "machine": describe_machine(device.type),
        "agreement": agreement(opened),
        "p_values": frequencies(opened),
        "tokens_per_second": {rows: speed(opened, rows, arguments.rounds) for rows in (1, 8, 32)},
    }
    for key, value in result.items():
        print(f"{key}: {value}")
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
