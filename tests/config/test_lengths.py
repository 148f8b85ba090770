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
    assert [learning_rate(by_steps, s) for s in (30, 35, 36)] == [2.0, pytest.approx(2 / 6), 0.0]
    by_tokens = run(
        DECAY, schedule={"kind": "wsd", "unit": "tokens", "decay": 90, "final_ratio": 0.0}
    )
    assert by_tokens.total_steps == 33  # 90 tokens are two steps and a quarter
    assert [learning_rate(by_tokens, s) for s in (30, 33, 34)] == [
        2.0,
        pytest.approx(2 * 40 / 130),
        0.0,
    ]


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


RAMP = [
    {"after_steps": 10, "global_batch_size": 8},
    {"after_tokens": 1600, "global_batch_size": 16},
]
GROWTH = {"batch_growth": {"max_batch_size": 16}}
SAVES = {"checkpoint": {"every_steps": 5}}


def test_a_ramp_counts_in_steps_and_tokens() -> None:
    config = run({"tokens": 3200, "batch_schedule": RAMP})
    assert config.batches.changes == ((0, 4), (10, 8), (25, 16))
    assert config.total_steps == 35 and config.total_tokens == 3200
    assert [config.accumulation_steps(2, step) for step in (9, 10, 24, 25)] == [1, 2, 2, 4]


@pytest.mark.parametrize(("scaling", "exponent"), [("none", 0.0), ("sqrt", 0.5), ("linear", 1.0)])
def test_the_learning_rate_scales_with_the_batch(scaling: str, exponent: float) -> None:
    schedule = {"kind": "constant", "batch_scaling": scaling}
    config = run({"tokens": 3200, "batch_schedule": RAMP}, schedule=schedule)
    rates = [learning_rate(config, step) for step in (10, 11, 26)]
    assert rates == pytest.approx([2.0, 2.0 * 2**exponent, 2.0 * 4**exponent])


@pytest.mark.parametrize(
    ("train", "sections", "message"),
    [
        ({"batch_schedule": [{"global_batch_size": 8}]}, {}, "train.batch_schedule.0.after_steps"),
        ({"batch_schedule": RAMP[::-1]}, {}, "train.batch_schedule is not in rising order"),
        (
            {"batch_schedule": [RAMP[0] | {"global_batch_size": 7}]},
            {},
            "train.batch_schedule.0.global_batch_size = 7 is not a multiple",
        ),
        (GROWTH, {}, "set checkpoint.every_steps"),
        (GROWTH | {"batch_schedule": RAMP}, SAVES, "either train.batch_schedule or"),
        (GROWTH, SAVES | {"schedule": {"unit": "tokens"}}, "set schedule.unit=steps"),
        (
            GROWTH,
            SAVES | {"data": {"stages": [{"steps": 5}, {"sequence_length": 5}]}},
            "data.stages are counted in steps",
        ),
    ],
)
def test_errors_of_batches_name_the_keys(
    train: dict[str, Any], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run({"steps": 40} | train, **sections)


def test_all_batches_are_checked_for_the_ranks_at_once() -> None:
    changes = [
        {"after_steps": step, "global_batch_size": size} for step, size in ((5, 12), (9, 10))
    ]
    config = run({"steps": 40, "batch_schedule": changes})
    with pytest.raises(ConfigError) as caught:
        config.accumulation_steps(3)
    message = str(caught.value)
    assert "train.global_batch_size = 4, train.batch_schedule.1.global_batch_size = 10" in message
    assert "= 2 x 3 = 6" in message and "batch_schedule.0" not in message
