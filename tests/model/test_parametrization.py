"""Parametrization: the rules of the papers' tables, and nothing but them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from nextpt.base.errors import ConfigError
from nextpt.config import Config
from nextpt.model import ModelSpec, Parametrization, build_decoder
from nextpt.model.parametrization import Factors
from nextpt.optim.registry import optimizer_spec
from tests.support.datasets import tiny

NOWHERE = Path("none")
MUP = {"parametrization": "mup", "base_width": 8}
COMPLETEP = {"parametrization": "completep", "base_width": 8, "base_depth": 2}
BASE = {"parametrization": "completep", "base_width": 32, "base_depth": 2}


def config_of(optimizer: dict[str, Any] | None = None, **model: Any) -> Config:
    return tiny(NOWHERE, NOWHERE, model=model, optimizer=optimizer or {})


def groups(optimizer: dict[str, Any] | None = None, **model: Any) -> dict[str, Any]:
    """Role of a parameter -> what its group has: (lr, weight decay, eps of AdamW)."""
    config = config_of(optimizer, **model)
    spec, facts = optimizer_spec(config), {}
    for name, parameter in build_decoder(config).named_parameters():
        group = spec.group_of(name, tuple(parameter.shape))
        options = group.options
        facts[spec.rules.role_of(name, tuple(parameter.shape))] = (
            pytest.approx(config.optimizer.lr * group.lr_factor),
            pytest.approx(options["weight_decay"]),
            pytest.approx(options["eps"]) if "eps" in options else None,
        )
    return facts


def test_rules_of_mup() -> None:
    rules = Parametrization("mup", width_ratio=4.0, depth=6)
    assert rules.adamw("matrices") == Factors(1 / 4, 4, 1 / 4)
    for role in ("embedding", "output", "vectors", "final_norm"):
        assert rules.adamw(role) == Factors(1, 1, 1 / 4)
    assert rules.muon("spectral") == rules.muon("original") == Factors()
    assert rules.muon("match_rms_adamw") == Factors(1 / 2, 2)
    assert (rules.residual_multiplier, rules.logits_scaling) == (1, 4)
    assert rules.init_std(0.02, "embedding") == rules.init_std(0.02, "output") == 0.02
    assert rules.init_std(0.02, "matrices") == 0.01
    assert rules.init_std(0.02, "matrices", residual=True) == pytest.approx(0.01 / 12**0.5)


def test_rules_of_completep_follow_depth_too() -> None:
    rules = Parametrization("completep", width_ratio=4.0, depth_ratio=3.0, depth=6)
    assert rules.adamw("matrices") == Factors(1 / 4, 4, 1 / 12)
    assert rules.adamw("vectors") == Factors(1, 1, 1 / 12)
    for role in ("embedding", "output", "final_norm"):
        assert rules.adamw(role) == Factors(1, 1, 1 / 4)
    assert rules.residual_multiplier == 1 / 3
    # Of the base depth, 2, whatever the depth
    assert rules.init_std(0.02, "matrices", residual=True) == pytest.approx(0.01 / 4**0.5)


def test_attention_logits_fall_with_the_head_width_beyond_the_base() -> None:
    base = config_of(**MUP, qk_norm=False, base_head_dim=8)
    assert ModelSpec.from_config(base).rules.attention_scale == 1 / math.sqrt(8)
    narrow = config_of(**MUP, qk_norm=False, base_head_dim=2)
    assert ModelSpec.from_config(narrow).rules.attention_scale == pytest.approx(2**0.5 / 8)


@pytest.mark.parametrize("tied", [False, True])
def test_optimizer_groups_of_adamw(tied: bool) -> None:
    lr, decay, eps = 3e-3, 0.1, 1e-8
    factors = groups(**COMPLETEP, depth=4, tied_embeddings=tied)
    assert factors.pop("matrices") == (lr / 4, 4 * decay, eps / 8)
    assert factors.pop("vectors") == (lr, 0, eps / 8)
    if not tied:
        assert factors.pop("output") == (lr, decay, eps / 4)
    assert factors == dict.fromkeys(("embedding", "final_norm"), (lr, 0, eps / 4))


def test_options_of_a_group_are_those_of_the_base_shape() -> None:
    own = {"eps": 1e-6, "output": {"lr": 0.5, "weight_decay": 0.2}, "vectors": {"lr": 0.1}}
    factors = groups(own, **MUP)
    assert factors["output"] == (0.5, 0.2, 1e-6 / 4)
    assert factors["vectors"] == factors["final_norm"] == (0.1, 0, 1e-6 / 4)


@pytest.mark.parametrize(
    ("scale", "factor"), [("match_rms_adamw", 1 / 2), ("original", 1), ("spectral", 1)]
)
def test_optimizer_groups_of_muon(scale: str, factor: float) -> None:
    muon = {"scale": scale, "lr": 0.02, "weight_decay": 0.3}
    factors = groups({"kind": "muon", "muon": muon}, **MUP)
    assert factors["matrices"] == (0.02 * factor, 0.3 / factor, None)
    assert factors["embedding"] == (3e-3, 0, 1e-8 / 4)
    assert factors["output"] == (3e-3, 0.1, 1e-8 / 4)


def test_at_the_base_shape_nothing_follows() -> None:
    plain, based = config_of(), config_of(**BASE)
    tokens = torch.arange(24).view(2, 12)
    models = [build_decoder(config) for config in (plain, based)]
    weights, others = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
    hidden = [model(tokens, torch.arange(12).expand(2, -1)).hidden for model in models]
    assert torch.equal(*hidden)
    specs = [optimizer_spec(config) for config in (plain, based)]
    assert specs[0].groups == specs[1].groups


def test_initial_weights_and_multipliers_of_a_decoder() -> None:
    """Draws are those of the standard parametrization, scaled."""
    plain = build_decoder(config_of(depth=4))
    model = build_decoder(config_of(**COMPLETEP, depth=4, logits_scaling=3.0))
    theirs = dict(plain.named_parameters())
    rules = model.spec.rules
    for name, parameter in model.named_parameters():
        factor = 1.0
        if rules.role_of(name, tuple(parameter.shape)) == "matrices":
            is_residual = "o_proj" in name or "down_proj" in name
            factor = 0.5 * (2**0.5 if is_residual else 1)
        torch.testing.assert_close(parameter, theirs[name] * factor)
    tokens, positions = torch.arange(12).view(1, 12), torch.arange(12).view(1, 12)
    x = model.embed_tokens(tokens)
    rope = model._rope[10000.0]
    at = tuple(table[positions].unsqueeze(2) for table in rope)
    for block in model.blocks:
        x = x + 0.5 * block.attention(block.attention_norm(x), at, None, None)[0]
        x = x + 0.5 * block.ffn(block.ffn_norm(x))
    expected = model.final_norm(x) / (3.0 * 4)
    torch.testing.assert_close(model(tokens, positions).hidden, expected)
    assert F.linear(expected, model.lm_head.weight).shape == (1, 12, 512)


def test_a_spec_keeps_only_the_base_shape_that_has_an_effect() -> None:
    base = {"base_width": 8, "base_depth": 1, "base_head_dim": 4}
    standard = ModelSpec.from_config(config_of(**base))
    assert standard == ModelSpec.from_config(config_of())
    assert "base_width" not in standard.to_json()
    mup = ModelSpec.from_config(config_of(**base, parametrization="mup", qk_norm=False))
    assert (mup.base_width, mup.base_depth, mup.base_head_dim) == (8, None, 4)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"parametrization": "mup"}, r"mup needs model.base_width, .*\(model.base_width=32 where"),
        (
            {"parametrization": "completep", "base_width": 8},
            r"completep needs model.base_depth, .*\(model.base_depth=2 where",
        ),
        (
            {"parametrization": "completep"},
            r"needs model.base_width and model.base_depth, .*width=32 model.base_depth=2 where",
        ),
        (MUP | {"base_head_dim": 4}, "base_head_dim = 4 has no effect with model.qk_norm = true"),
        ({"parametrization": "mupp"}, "standard"),
    ],
)
def test_errors_name_the_keys_of_the_base_shape(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(**model)
