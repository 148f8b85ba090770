"""Scores of single tokens are those of the whole distribution; calibration counts by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from nextpt.evaluate import tokens as module
from nextpt.evaluate.calibration import EVERY_BINS, TOP_BINS, Calibration, Reliability
from nextpt.evaluate.documents import score_documents
from nextpt.evaluate.tokens import next_tokens, score_tokens
from tests.support.models import POSITIONS, decoder, our_logits, some_tokens


def test_scores_are_those_of_the_whole_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = decoder()
    document = some_tokens(96, 30)[0]
    probabilities = our_logits(model, document[None])[0].double().softmax(-1)
    whole = score_tokens(model, document.numpy(), window=POSITIONS, stride=20, alternatives=5)
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 4 * 96)  # in parts
    parts = score_tokens(model, document.numpy(), window=POSITIONS, stride=20, alternatives=5)
    for scores in (whole, parts):
        assert scores.ids.tolist() == document[1:].tolist()
        for position, token in enumerate(scores.ids.tolist()):
            p = probabilities[position]
            assert scores.nats[position] == pytest.approx(-float(p[token].log()), abs=1e-4)
            assert scores.rank[position] == 1 + int((p > p[token]).sum())
            assert scores.entropy[position] == pytest.approx(-float((p * p.log()).sum()), abs=1e-4)
            assert scores.alternatives[position].tolist() == p.topk(5).indices.tolist()
            assert np.exp(-scores.alternative_nats[position]) == pytest.approx(
                p.topk(5).values.tolist(), rel=1e-4
            )
    entropy, ids, nats = next_tokens(model, document.numpy(), window=POSITIONS, alternatives=3)
    assert ids.tolist() == probabilities[-1].topk(3).indices.tolist()
    assert entropy == pytest.approx(
        -float((probabilities[-1] * probabilities[-1].log()).sum()), abs=1e-4
    )
    assert np.exp(-nats) == pytest.approx(probabilities[-1].topk(3).values.tolist(), rel=1e-4)


@pytest.mark.parametrize("stride", [7, 20, POSITIONS])
def test_a_text_longer_than_the_context_is_scored_as_by_evaluation(stride: int) -> None:
    _, model = decoder()
    document = torch.cat(list(some_tokens(96, 90))).numpy()
    scores = score_tokens(model, document, window=POSITIONS, stride=stride)
    figures, _ = score_documents(
        model,
        [document],
        [np.ones(179, dtype=np.uint32)],
        np.ones(96, dtype=np.uint16),
        window=POSITIONS,
        stride=stride,
    )
    assert len(scores.nats) == figures.tokens == 179 and scores.nats.sum() == pytest.approx(
        figures.nats, rel=1e-6
    )
    assert next_tokens(model, document, window=POSITIONS)[1].shape == (8,)


def calibration_of(logits: torch.Tensor, targets: torch.Tensor) -> Calibration:
    calibration = Calibration()
    for part, observed in zip(logits.split(1000), targets.split(1000), strict=True):
        calibration.add(part.log_softmax(-1), observed)
    return calibration


def test_tokens_drawn_from_the_distribution_are_calibrated_and_others_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 50, generator=generator)
    targets = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    right, sure = calibration_of(logits, targets), calibration_of(2 * logits, targets)
    assert right.top.expected_error < 0.02 < 0.1 < sure.top.expected_error
    bins = [b for curve in (right.top, right.every) for b in curve.bins()]
    inside = [b["interval"][0] <= b["predicted"] <= b["interval"][1] for b in bins]
    assert sum(inside) >= 0.8 * len(inside)
    wrong = [
        b["interval"][0] <= b["predicted"] <= b["interval"][1]
        for b in sure.every.bins()
        if b["count"] > 1000
    ]
    assert sum(wrong) <= 0.3 * len(wrong)


def test_counts_by_hand() -> None:
    reliability = Reliability(np.array([0.0, 0.5, 1.0]))
    reliability.add(torch.tensor([0.2, 0.4, 0.5, 0.9]), torch.tensor([0.4, 0.9]))
    low, high = reliability.bins()
    assert (low["count"], low["predicted"], low["observed"]) == (2, pytest.approx(0.3), 0.5)
    assert (high["low"], high["count"], high["predicted"], high["observed"]) == (
        0.5,
        2,
        pytest.approx(0.7),
        0.5,
    )
    assert low["interval"] == list(binomtest(1, 2).proportion_ci(0.95, "wilson"))
    assert reliability.expected_error == pytest.approx(0.5 * 0.2 + 0.5 * 0.2)


def test_every_token_of_the_vocabulary_counts_once() -> None:
    # Down to probability 0
    logits = torch.randn(30, 50, generator=torch.Generator().manual_seed(1)) * 20
    calibration = calibration_of(logits, torch.arange(30))
    every, top = calibration.as_dict()["every"], calibration.as_dict()["top"]
    assert (
        sum(b["count"] for b in every) == 30 * 50
        and sum(b["count"] for b in top) == calibration.positions == 30
    )
    assert sum(b["count"] * b["observed"] for b in every) == pytest.approx(30)
    assert (TOP_BINS[0], TOP_BINS[-1], EVERY_BINS[0], EVERY_BINS[-1]) == (0, 1, 0, 1) and len(
        TOP_BINS
    ) == 16
