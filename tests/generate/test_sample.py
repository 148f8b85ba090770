"""Sampling: the distribution by its definition, and the frequencies of draws from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bench.generation import chi_squared
from nextpt.base.errors import UserError
from nextpt.generate.sample import Sampling, continuation_rng, distribution, draw
from tests.support.models import decoder, our_logits, some_tokens

LOGITS = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1]]))


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.5, 0.25, 0.15, 0.1]),
        (Sampling(temperature=0), [1, 0, 0, 0]),
        (Sampling(top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(top_k=9), [0.5, 0.25, 0.15, 0.1]),
        (Sampling(top_p=0.5), [1, 0, 0, 0]),
        (Sampling(top_p=0.51), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(top_p=1.0), [0.5, 0.25, 0.15, 0.1]),
        (Sampling(temperature=0.5), [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
        (Sampling(min_p=0.29), [5 / 9, 2.5 / 9, 1.5 / 9, 0]),
        (Sampling(min_p=1.0), [1, 0, 0, 0]),
        (Sampling(temperature=0.5, min_p=0.2), [0.8, 0.2, 0, 0]),  # after the temperature
        # Of the three that top-k left, the first two have 5/6
        (Sampling(top_k=3, top_p=0.8), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(temperature=1e-9), [1, 0, 0, 0]),
    ],
)
def test_distribution(sampling: Sampling, expected: list[float]) -> None:
    assert distribution(LOGITS, sampling)[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_repetition_penalty_makes_seen_tokens_less_likely_whatever_their_sign() -> None:
    logits, seen = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[True, True, False]])
    penalized = distribution(logits, Sampling(repetition_penalty=2.0), seen)
    torch.testing.assert_close(
        penalized, torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64).softmax(-1)
    )
    assert distribution(logits, Sampling(temperature=0, repetition_penalty=5.0), seen).argmax() == 2
    assert torch.equal(
        distribution(logits, Sampling(repetition_penalty=1.0), seen),
        distribution(logits, Sampling()),
    )


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"seed": -1},
    ],
)
def test_bad_settings_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampling(**bad)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"top_k": 9},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
    ],
)
def test_drawn_frequencies_are_those_of_the_exact_distribution(settings: dict[str, Any]) -> None:
    """Chi-squared, 1e5 draws for a model's own logits; tokens that were cut off are never drawn."""
    draws = 100_000
    logits = our_logits(decoder()[1], some_tokens(96, 12))[:1, -1]
    sampling = Sampling(**settings, seed=5)
    exact = distribution(logits, sampling, torch.arange(96).unsqueeze(0) % 3 == 0)
    uniform = torch.from_numpy(continuation_rng(5, 0, 0).random(draws))
    counts = np.bincount(draw(exact.expand(draws, -1), uniform).numpy(), minlength=96)
    probabilities = exact[0].numpy()
    assert counts[probabilities == 0].sum() == 0
    assert chi_squared(counts, probabilities) > 0.001
    possible = probabilities > 0
    counts[possible] = np.roll(counts[possible], 1)
    assert chi_squared(counts, probabilities) < 1e-9, (
        "the test does not see tokens that are mixed up"
    )


def test_the_ends_of_the_unit_interval_draw_possible_tokens() -> None:
    probabilities = torch.tensor([[0.0, 0.3, 0.7, 0.0]], dtype=torch.float64).expand(2, -1)
    assert draw(probabilities, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [
        1,
        2,
    ]
    thirds = torch.full((1, 3), 1 / 3, dtype=torch.float64) * (1 - 1e-9)  # a sum below 1
    assert draw(thirds, torch.tensor([1 - 2**-53], dtype=torch.float64)).tolist() == [2]
