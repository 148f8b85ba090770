"""The learning rate, pointwise."""

from __future__ import annotations

import math

import pytest

from nextpt.config import parse_config
from nextpt.optim.schedules import learning_rate


def run(**schedule: object):
    return parse_config(
        {
            "run": {"name": "t"},
            "data": {"path": "d", "sequence_length": 10},
            "model": {"vocab_size": 8, "depth": 1, "width": 8, "heads": 1},
            "optimizer": {"lr": 2.0},
            "train": {"steps": 100, "global_batch_size": 1, "micro_batch_size": 1},
            "schedule": schedule,
        },
        "test",
    )


def test_cosine() -> None:
    c = run(kind="cosine", warmup=10, final_ratio=0.1)
    assert learning_rate(c, 5) == pytest.approx(1.0)
    assert learning_rate(c, 10) == pytest.approx(2.0)
    assert learning_rate(c, 55) == pytest.approx(
        2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    )
    assert learning_rate(c, 100) == pytest.approx(0.2)


def test_wsd() -> None:
    c = run(kind="wsd", warmup=10, decay=20, final_ratio=0.0)
    assert [learning_rate(c, s) for s in (10, 50, 80, 90, 100)] == pytest.approx(
        [2.0, 2.0, 2.0, 1.0, 0.0]
    )


def test_tokens_and_steps_are_the_same_schedule() -> None:
    by_steps = run(kind="wsd", warmup=10, decay=20)
    by_tokens = run(kind="wsd", unit="tokens", warmup=100, decay=200)
    assert [learning_rate(by_steps, s) for s in range(1, 101)] == [
        learning_rate(by_tokens, s) for s in range(1, 101)
    ]


def test_no_warmup_starts_at_the_peak() -> None:
    assert learning_rate(run(kind="constant"), 1) == 2.0
