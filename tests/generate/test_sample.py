"""Decoding: distributions, stopping, and the cache against the whole text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nextpt.errors import UserError
from nextpt.generate.sample import Sampling, continuation, distribution
from nextpt.model import Decoder, KVCache
from tests.support.datasets import tiny

LOGITS = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.1]))


@pytest.mark.parametrize(("sampling", "expected"), [
    (Sampling(), [0.5, 0.25, 0.15, 0.1]),
    (Sampling(temperature=0), [1, 0, 0, 0]),
    (Sampling(top_k=2), [2 / 3, 1 / 3, 0, 0]),
    (Sampling(top_k=9), [0.5, 0.25, 0.15, 0.1]),
    (Sampling(top_p=0.5), [1, 0, 0, 0]),
    (Sampling(top_p=0.51), [2 / 3, 1 / 3, 0, 0]),
    (Sampling(top_p=1.0), [0.5, 0.25, 0.15, 0.1]),
    (Sampling(temperature=0.5), [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
])
def test_distribution(sampling: Sampling, expected: list[float]) -> None:
    assert distribution(LOGITS, sampling).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_bad_settings_are_named(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampling(**bad)


@pytest.fixture(scope="module")
def setup() -> tuple:
    config = tiny(Path("none"), Path("none"), model={"vocab_size": 64, "depth": 2, "width": 32, "heads": 4},
                  data={"sequence_length": 32})
    return config, Decoder(config).eval()


def run(setup: tuple, prompt: list[int], sampling: Sampling, stop: int = -1, max_tokens: int = 12) -> list[int]:
    config, model = setup
    cache = KVCache.empty(config, 1, 32, dtype=torch.float32, device=torch.device("cpu"))
    return list(continuation(model, prompt, max_tokens=max_tokens, max_position=32, stop_id=stop, sampling=sampling, cache=cache))


def test_greedy_is_the_arg_max_of_the_whole_text(setup: tuple) -> None:
    config, model = setup
    text = [1, 2, 3]
    for token in run(setup, text, Sampling(temperature=0)):
        with torch.no_grad():
            hidden = model(torch.tensor([text]), torch.arange(len(text)).unsqueeze(0))
        assert token == int(model.lm_head(hidden)[0, -1].argmax())
        text.append(token)


def test_seed_decides(setup: tuple) -> None:
    assert run(setup, [1], Sampling(seed=3)) == run(setup, [1], Sampling(seed=3)) != run(setup, [1], Sampling(seed=4))


def test_stops_at_the_end_of_the_document_and_of_the_positions(setup: tuple) -> None:
    tokens = run(setup, [1], Sampling(seed=3))
    assert run(setup, [1], Sampling(seed=3), stop=tokens[5]) == tokens[: tokens.index(tokens[5])]
    assert len(run(setup, [1] * 30, Sampling(), max_tokens=50)) == 2
    with pytest.raises(UserError, match="positions end at 32"):
        run(setup, [1] * 32, Sampling())
