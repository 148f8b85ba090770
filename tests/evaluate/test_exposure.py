"""Exposure bias: scores are the model's, the parts sum to the gap, no gap where there is none."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from nextpt.base.errors import DataError
from nextpt.evaluate.exposure import (
    ExposureProtocol,
    _repeats,
    _scores,
    continue_freely,
    exposure_bias,
)
from nextpt.evaluate.loaded_model import LoadedModel, open_model
from nextpt.evaluate.memorization.extraction import greedy
from nextpt.generate.sample import Sampling
from tests.support.runs import make_run

TEXTS = {
    "verse": ["Whan that Aprille with his shoures soote\n" * n for n in (4, 9)],
    "code": ["def f(x):\n    return x + 1\n" * 9],
}
PROTOCOL = ExposureProtocol(prefix=4, continuation=12, continuations=9, resamples=50)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("exposure") / "run"
    make_run(folder)
    return open_model(folder)


def banned(source: LoadedModel) -> torch.Tensor:
    return torch.from_numpy(source.tokenizer.token_bytes() == 0)


@pytest.mark.thorough
def test_scores_leave_special_tokens_out_and_nothing_else(source: LoadedModel) -> None:
    tokens = torch.from_numpy(
        source.tokenizer.encode(TEXTS["verse"][1])[:16].astype(np.int64)
    ).unsqueeze(0)
    nats, entropy = _scores(source.decoder, tokens, 4, banned(source))
    with torch.no_grad():
        logits = source.model.lm_head(
            source.model(tokens[:, :-1], torch.arange(15).unsqueeze(0)).hidden
        ).double()[0, 3:]
    probabilities = logits.softmax(-1)
    probabilities[:, banned(source)] = 0
    assert 0 < float(probabilities.sum(-1).max()) < 1  # the real text has special tokens
    probabilities /= probabilities.sum(-1, keepdim=True)
    assert nats[0] == pytest.approx(
        -probabilities[torch.arange(12), tokens[0, 4:]].log().numpy(), abs=1e-5
    )
    assert entropy[0] == pytest.approx(torch.special.entr(probabilities).sum(-1).numpy(), abs=1e-5)


def test_continuations_have_no_special_token_and_follow_the_model(source: LoadedModel) -> None:
    prefixes = torch.from_numpy(
        np.stack(
            [source.tokenizer.encode(TEXTS["verse"][1])[at : at + 4] for at in range(40)]
        ).astype(np.int64)
    )
    positions = [(0, row) for row in range(40)]
    drawn = continue_freely(
        source.decoder, prefixes, 12, banned(source), Sampling(seed=3), positions
    )
    assert not banned(source)[drawn].any() and len(drawn.unique()) > 20
    nats, entropy = _scores(source.decoder, torch.cat([prefixes, drawn], dim=1), 4, banned(source))
    # 0 on average for tokens drawn from the model's distribution
    surplus = (nats - entropy).sum(axis=1)
    assert abs(surplus.mean()) < 4 * surplus.std() / math.sqrt(40)
    assert torch.equal(
        drawn[7:9],
        continue_freely(
            source.decoder, prefixes[7:9], 12, banned(source), Sampling(seed=3), positions[7:9]
        ),
    )
    nothing = torch.zeros_like(banned(source))
    assert torch.equal(
        continue_freely(source.decoder, prefixes, 12, nothing, Sampling(temperature=0), positions),
        greedy(source.decoder, prefixes, 12),
    )


@pytest.mark.thorough
def test_the_parts_sum_to_the_gap_at_any_batch_size(source: LoadedModel) -> None:
    result = exposure_bias(source, TEXTS, PROTOCOL)
    for of in (result["total"], *result["domains"].values(), *result["by_position"]):
        assert of["gap"]["value"] == pytest.approx(
            of["miscalibration"]["value"] + of["drift"]["value"], abs=1e-12
        )
    total, arms = result["total"], result["total"]["arms"]
    assert total["gap"]["value"] == pytest.approx(
        arms["real"]["nats_per_token"]["value"] - arms["sampled"]["nats_per_token"]["value"]
    )
    assert (
        total["continuations"] == sum(of["continuations"] for of in result["domains"].values())
        and total["tokens"] == 12 * total["continuations"]
    )
    assert [(row["from"], row["to"]) for row in result["by_position"]] == [
        (1, 1),
        (2, 3),
        (4, 7),
        (8, 12),
    ]
    weights = np.array([1, 2, 4, 5]) / 12
    assert weights @ [row["real"]["value"] for row in result["by_position"]] == pytest.approx(
        arms["real"]["nats_per_token"]["value"]
    )
    # Code is one document
    assert (
        result["domains"]["code"]["gap"]["interval"] is None and len(total["gap"]["interval"]) == 2
    )
    repeated = exposure_bias(
        source,
        TEXTS,
        ExposureProtocol(prefix=4, continuation=12, continuations=9, batch_size=2, resamples=50),
    )
    assert repeated["total"]["drift"]["value"] == pytest.approx(total["drift"]["value"], abs=1e-6)


@pytest.mark.thorough
def test_a_uniform_model_has_no_gap(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    source = open_model(tmp_path / "run")
    torch.nn.init.zeros_(source.model.lm_head.weight)
    of = exposure_bias(source, TEXTS, PROTOCOL)["total"]
    even = math.log(int((source.tokenizer.token_bytes() > 0).sum()))
    assert [
        of["arms"][arm]["nats_per_token"]["value"] for arm in ("real", "sampled", "greedy")
    ] == pytest.approx([even] * 3)
    assert [of[part]["value"] for part in ("gap", "miscalibration", "drift")] == pytest.approx(
        [0, 0, 0], abs=1e-5
    )
    # One token twelve times: 9 grams, 1 kind
    assert of["arms"]["greedy"]["repeats"]["value"] == pytest.approx(8 / 9)


def test_repeats() -> None:
    assert _repeats([1, 2, 3, 4, 5]) == 0 and _repeats([1, 2, 1, 2, 1, 2]) == pytest.approx(1 / 3)


def test_sizes() -> None:
    assert (
        ExposureProtocol().sizes(256) == (64, 192)
        and ExposureProtocol(continuation=56).sizes(256) == (200, 56)
        and ExposureProtocol(prefix=6).sizes(256) == (6, 250)
    )
    for prefix, continuation in ((0, None), (250, 20), (255, None), (None, 256)):
        with pytest.raises(DataError, match="together at most the model's 256 positions"):
            ExposureProtocol(prefix, continuation).sizes(256)


def test_documents_that_are_too_short_are_reported(source: LoadedModel) -> None:
    with pytest.raises(DataError, match="no document of verse has 16 tokens"):
        exposure_bias(source, {"verse": ["Whan"]}, PROTOCOL)
