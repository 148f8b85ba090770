"""Length of a run: in steps, tokens or epochs, or by the decay that ends it."""

from __future__ import annotations

from typing import Any

import pytest

from nextpt.base.errors import ConfigError
from nextpt.config import Config, parse_config
from nextpt.optim.schedules import learning_rate


def run(train: dict[str, Any], **sections: dict[str, Any]) -> Config:
    """Batches of 4 sequences of 10 tokens."""
    values: dict[str, Any] = {
        "run": {"name": "t"},
        "data": {"path": "d", "sequence_length": 10},
        "model": {"vocab_size": 8, "depth": 1, "width": 8, "heads": 1},
        "optimizer": {"lr": 2.0},
        "train": {"global_batch_size": 4, "micro_batch_size": 2} | train,
    }
    for name, changes in sections.items():
        values[name] = values.get(name, {}) | changes
    return parse_config(values, "test")


DECAY = {"decay_from": {"run": "runs/stable", "at_step": 30}}


@pytest.mark.parametrize(
    ("train", "steps"),
    [
        ({"steps": 7}, 7),
        ({"tokens": 121}, 4),
        ({"epochs": 3, "epoch_sequences": 10}, 8),
        ({"epochs": 0.7, "epoch_sequences": 40}, 7),
    ],
)
def test_each_length_gives_whole_steps(train: dict[str, Any], steps: int) -> None:
    config = run(train)
    assert config.total_steps == steps
    assert config.total_tokens == 40 * steps


def test_a_decay_sets_the_length() -> None:
    by_steps = run(DECAY, schedule={"kind": "wsd", "decay": 5, "final_ratio": 0.0})
    assert by_steps.total_steps == 35
    assert [learning_rate(by_steps, s) for s in (30, 35)] == [2.0, 0.0]
    by_tokens = run(
        DECAY, schedule={"kind": "wsd", "unit": "tokens", "decay": 90, "final_ratio": 0.0}
    )
    assert by_tokens.total_steps == 33  # 90 tokens are two steps and a quarter
    assert [learning_rate(by_tokens, s) for s in (30, 33)] == [2.0, 0.0]


@pytest.mark.parametrize(
    ("train", "sections", "message"),
    [
        ({}, {}, "train.steps, train.tokens and train.epochs; given: none"),
        ({"steps": 1, "epochs": 1}, {}, "given: train.steps, train.epochs"),
        ({"epochs": 0}, {}, "train.epochs = 0"),
        ({"epochs": 1}, {"data": {"mixing": {"code": 1}}}, "train.epochs counts passes"),
        (DECAY | {"tokens": 9}, {}, "train.tokens=null"),
        (DECAY, {}, "train.decay_from needs schedule.decay"),
        (DECAY, {"schedule": {"kind": "wsd"}}, "train.decay_from needs schedule.decay"),
    ],
)
def test_errors_name_the_keys(
    train: dict[str, Any], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(train, **sections)


def test_epochs_need_a_count() -> None:
    config = run({"epochs": 2})
    with pytest.raises(ConfigError, match=r"train.epochs = 2.*train.epoch_sequences"):
        config.total_steps  # noqa: B018  # the property raises
