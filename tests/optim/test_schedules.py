"""The learning rate, pointwise."""

from __future__ import annotations

import math

import pytest

from nextpt.base.errors import ConfigError
from nextpt.config import BatchSchedule, parse_config
from nextpt.optim.schedules import learning_rate, milestones


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
    assert [learning_rate(c, s) for s in (10, 50, 80, 90, 100, 101)] == pytest.approx(
        [2.0, 2.0, 2.0, 2.0 * 11 / 21, 2.0 / 21, 0.0]
    )
    c = run(kind="wsd", warmup=10, decay=20, final_ratio=0.5)
    assert [learning_rate(c, s) for s in (80, 90, 100)] == pytest.approx([2.0, 1.5, 1.0])


@pytest.mark.parametrize(
    "schedule",
    [
        {"kind": "cosine"},
        {"kind": "linear"},
        {"kind": "wsd", "decay": 20},
        {"kind": "wsd", "decay": 20, "decay_shape": "sqrt"},
        {"kind": "power", "power_from": 20, "decay": 20},
        {"kind": "wsd", "decay": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("unit", [1, 10])
def test_a_decay_to_zero_leaves_no_step_without_a_rate(schedule: dict, unit: int) -> None:
    lengths = {key: value * unit for key, value in schedule.items() if isinstance(value, int)}
    name = "steps" if unit == 1 else "tokens"
    c = run(**schedule | lengths, unit=name, warmup=10 * unit, final_ratio=0.0)
    rates = [learning_rate(c, step) for step in range(1, 102)]
    assert all(rate > 0 for rate in rates[:100])
    assert rates[100] == pytest.approx(0.0, abs=1e-15)
    assert rates[9] == 2.0 == max(rates)
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_tokens_and_steps_are_the_same_schedule() -> None:
    by_steps = run(kind="wsd", warmup=10, decay=20)
    by_tokens = run(kind="wsd", unit="tokens", warmup=100, decay=200)
    assert [learning_rate(by_steps, s) for s in range(1, 101)] == [
        learning_rate(by_tokens, s) for s in range(1, 101)
    ]


def test_linear_ends_at_zero_unless_a_ratio_is_set() -> None:
    c = run(kind="linear", warmup=20)
    assert [learning_rate(c, s) for s in (10, 20, 60, 100)] == pytest.approx(
        [1.0, 2.0, 82 / 81, 2 / 81]
    )
    assert learning_rate(c, 101) == 0.0
    assert learning_rate(run(kind="linear", final_ratio=0.2), 100) == pytest.approx(0.4)


def test_square_root_decay() -> None:
    c = run(kind="wsd", warmup=10, decay=20, decay_shape="sqrt", final_ratio=0.0)
    assert [learning_rate(c, s) for s in (80, 85, 95, 100)] == pytest.approx(
        [2.0, *(2.0 * (1 - math.sqrt(over / 21)) for over in (5, 15, 20))]
    )
    assert learning_rate(c, 101) == 0.0


def test_power_falls_from_its_peak_and_then_decays() -> None:
    c = run(kind="power", warmup=10, power_from=20, decay=20, final_ratio=0.0)
    assert [learning_rate(c, s) for s in (5, 10, 20)] == pytest.approx([1.0, 2.0, 2.0])
    assert learning_rate(c, 60) == pytest.approx(2.0 * 3**-0.51)
    assert learning_rate(c, 90) == pytest.approx(2.0 * 4**-0.51 * 11 / 21)
    assert learning_rate(c, 101) == 0.0


def test_default_decay_is_a_fifth_of_what_is_consumed() -> None:
    c = run(kind="wsd", unit="tokens", final_ratio=0.0)
    ramp = BatchSchedule(10, ((0, 1), (50, 3)))
    assert c.total_steps == 100 and ramp.consumed_tokens(100) == 2000
    assert learning_rate(c, 86, ramp) == 2.0 > learning_rate(c, 87, ramp)
    assert learning_rate(c, 100, ramp) == pytest.approx(2.0 * 30 / 430)
    assert learning_rate(c, 101, ramp) == 0.0


def test_milestones_are_steps() -> None:
    c = run(kind="power", unit="tokens", warmup=100, power_from=300, decay=200)
    assert [step for step, _ in milestones(c)] == [10, 30, 80, 100]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "cosine", "decay": 5}, "schedule.decay is for schedule.kind = wsd or power"),
        ({"kind": "linear", "decay_shape": "sqrt"}, "schedule.decay_shape"),
        ({"kind": "power"}, "schedule.power_from = None"),
        ({"kind": "wsd", "power_from": 3}, "schedule.power_from = 3"),
        ({"kind": "power", "warmup": 9, "power_from": 8}, "schedule.power_from = 8"),
    ],
)
def test_keys_of_other_kinds_are_refused(keys: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(**keys)


def test_no_warmup_starts_at_the_peak() -> None:
    assert learning_rate(run(kind="constant"), 1) == 2.0
