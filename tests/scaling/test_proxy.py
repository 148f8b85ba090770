"""Planning of a proxy: shape, batch, length, schedule; factors from it to the large run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from nextpt.base.errors import ConfigError, ScalingError
from nextpt.config import Config, load_config
from nextpt.scaling.proxy import (
    HORIZON_EXPONENT,
    parameters_of,
    plan_proxy,
    scaled_values,
    set_values,
    transfer,
)
from nextpt.scaling.shapes import group_width
from tests.support.datasets import tiny

ROOT = Path(__file__).resolve().parents[2]
LARGE = {
    "model": {
        "width": 128,
        "depth": 8,
        "heads": 16,
        "kv_heads": 8,
        "ffn_width": 384,
        "parametrization": "completep",
        "base_width": 32,
        "base_depth": 2,
    },
    "train": {"steps": 10_000, "global_batch_size": 64},
    "schedule": {"kind": "wsd", "warmup": 200, "decay": 2000},
}


def large(**changes: Any) -> Config:
    sections = {name: LARGE.get(name, {}) | changes.get(name, {}) for name in {**LARGE, **changes}}
    return tiny(Path("none"), Path("none"), **sections)


def plan(config: Config, **options: Any) -> Config:
    return plan_proxy(config, **({"ranks": 1} | options))


def test_the_proxy_has_the_base_shape_and_the_ratios_of_the_large_run() -> None:
    model = plan(large()).model
    assert (model.width, model.depth, model.heads, model.kv_heads) == (32, 2, 4, 2)
    assert (model.head_dim, model.ffn_width) == (8, 96)
    # Under muP nothing follows from the depth
    assert plan(large(model={"parametrization": "mup"})).model.depth == 8


def test_length_and_batch_follow_from_twenty_tokens_per_parameter() -> None:
    config = large()
    proxy = plan(config)
    tokens = 20 * parameters_of(proxy)
    assert proxy.total_tokens == pytest.approx(tokens, rel=0.01)
    ratio = (tokens / config.total_tokens) ** 0.383
    assert proxy.train.global_batch_size in (8, 16, 32)
    assert 2**-0.5 <= proxy.train.global_batch_size / (64 * ratio) <= 2**0.5


def test_with_steps_the_batch_is_that_of_the_same_rule() -> None:
    config = large()
    by_steps = plan(config, steps=plan(config).total_steps)
    assert by_steps.train == plan(config).train
    assert plan(config, steps=10).train.global_batch_size == 2  # the micro-batch
    assert plan(config, steps=10, ranks=8).train.global_batch_size == 16
    assert plan(config, steps=10_000).train.global_batch_size == 64
    assert plan(config, steps=10, batch_size=12).train.global_batch_size == 12


def test_the_schedule_is_in_proportion_and_the_warm_up_not_a_few_steps() -> None:
    schedule = plan(large(), steps=1000).schedule
    assert (schedule.unit, schedule.warmup, schedule.decay) == ("steps", 50, 200)
    assert plan(large(schedule={"warmup": 3000}), steps=1000).schedule.warmup == 300
    assert plan(large(schedule={"warmup": 5}), steps=1000).schedule.warmup == 5
    per_step = 64 * 64
    in_tokens = {"unit": "tokens", "warmup": 3000 * per_step, "decay": 2000 * per_step}
    assert plan(large(schedule=in_tokens), steps=1000).schedule == (
        plan(large(schedule={"warmup": 3000}), steps=1000).schedule
    )
    whole = plan(large(schedule={"warmup": 8000, "decay": 2000}), steps=3).schedule
    assert whole.warmup + (whole.decay or 0) <= 3


def test_what_belongs_to_the_large_run_is_left_out() -> None:
    config = large(
        data={"stages": [{"steps": 9000}, {"steps": 1000, "sequence_length": 32}]},
        checkpoint={"mirror": "/mirror", "every_steps": 100},
        train={
            "batch_schedule": [{"after_steps": 5, "global_batch_size": 128}],
            "stop_at": 9,
            "global_batch_size": 64,
            "ema": 0.99,
            "zero_stage": 3,
            "hpz_ranks": 8,
        },
        validation={"averages": True},
    )
    proxy = plan(config, steps=100)
    assert proxy.data.stages and [s.steps for s in proxy.data.stages] == [90, None]
    assert proxy.checkpoint.mirror is None and proxy.checkpoint.every_steps == 100
    assert proxy.train.batch_schedule is None and proxy.train.stop_at is None
    assert proxy.train.ema is None and proxy.train.hpz_ranks is None
    assert proxy.validation.every_steps == proxy.last_step == 100
    assert not proxy.validation.averages
    assert proxy.guard.max_rollbacks == 0


def test_a_run_transfers_to_itself_unchanged() -> None:
    config = large()
    factors = transfer(config, config)
    assert (factors.lr, factors.weight_decay, factors.lr_range) == (1.0, 1.0, (1.0, 1.0))


def test_factors_are_those_of_the_published_rules() -> None:
    config = large()
    longer = large(train={"steps": 40_000})
    factors = transfer(config, longer)
    assert factors.lr == pytest.approx(4**-HORIZON_EXPONENT)
    # The time scale in steps: lr wd S is in proportion to (tokens per parameter)^0.53
    assert factors.lr * factors.weight_decay * 4 == pytest.approx(4**0.53)
    assert factors.lr_range == pytest.approx((4**-0.7, 1))
    wider = large(train={"steps": 2500, "global_batch_size": 256})
    factors = transfer(config, wider)
    assert factors.lr == pytest.approx(2) and factors.tokens == 1
    assert factors.weight_decay == pytest.approx(4 / 2)  # a quarter of the steps, twice the rate


def test_without_a_horizon_exponent_the_length_leaves_the_learning_rate() -> None:
    factors = transfer(large(), large(train={"steps": 40_000}), horizon_exponent=0)
    assert factors.lr == factors.lr_for_tokens == 1
    assert factors.weight_decay == pytest.approx(4 ** (0.53 - 1))


@pytest.mark.parametrize("horizon_exponent", [0.0, 0.32, 1.0])
def test_the_middle_of_a_search_transfers_to_the_config_as_it_is(horizon_exponent: float) -> None:
    config = large(optimizer={"lr": 0.004, "weight_decay": 0.1})
    proxy = plan(config, steps=1000, horizon_exponent=horizon_exponent)
    factors = transfer(proxy, config, horizon_exponent)
    for name, factor in (("lr", factors.lr), ("weight_decay", factors.weight_decay)):
        before, middle = getattr(config.optimizer, name), getattr(proxy.optimizer, name)
        assert 2**-0.5 <= middle * factor / before <= 2**0.5
        # The same values are tried with other factors, so that finished trials serve again
        assert math.log2(middle / before) == pytest.approx(
            round(math.log2(middle / before)), abs=0.01
        )


def test_groups_keep_their_ratios() -> None:
    muon = {"kind": "muon", "lr": 0.004, "muon": {"lr": 0.02, "weight_decay": 0.2}}
    decays = {"weight_decay": 0.0, "embedding": {"lr": 0.008, "weight_decay": 0.0}}
    section = large(optimizer=muon | decays).optimizer
    assert scaled_values(section, "lr", 2) == {
        "optimizer.lr": 0.008,
        "optimizer.embedding.lr": 0.016,
        "optimizer.muon.lr": 0.04,
    }
    assert set_values(section, "weight_decay") == {"optimizer.muon.weight_decay": 0.2}
    assert scaled_values(section, "weight_decay", 0.5) == {"optimizer.muon.weight_decay": 0.1}


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"model": {"parametrization": "standard"}}, {}, "model.parametrization=mup"),
        ({"model": {"base_width": 24}}, {}, "model.base_width = 24 is not a multiple of 16"),
        ({"model": {"head_dim": 4}}, {}, "16 x 4 is not model.width = 128"),
        ({"train": {"init_from": "gpt2"}}, {}, "train.init_from is set"),
        ({}, {"steps": 20_000}, "--steps 20000 is more than the 10000 steps"),
        ({}, {"same_shape": True}, "--same-shape needs --steps"),
    ],
)
def test_user_errors(changes: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ScalingError, match=message):
        plan(large(**changes), **options)


def test_a_batch_that_ranks_cannot_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"not a multiple of train.micro_batch_size x ranks"):
        plan(large(), ranks=3)


def test_the_whole_model_can_be_the_proxy() -> None:
    config = large(model={"parametrization": "standard"})
    proxy = plan(config, steps=100, same_shape=True)
    assert proxy.model == config.model


@pytest.mark.parametrize("name", ["124m", "350m", "1.3b", "7b", "70b"])
def test_shipped_configs_have_a_proxy(name: str) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    width = group_width(load_config(path))
    base = [f"model.base_width={width}", "model.base_depth=4"]
    config = load_config(path, ["model.parametrization=completep", *base])
    proxy = plan(config)
    assert (proxy.model.width, proxy.model.depth) == (width, 4)
    assert proxy.total_tokens < config.total_tokens
