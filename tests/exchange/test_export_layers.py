"""Export of layer options: the same logits in transformers, or a refusal by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nextpt.base.errors import CheckpointError
from nextpt.exchange.architectures import choose_architecture
from nextpt.exchange.export_hf import EXACT
from nextpt.model import ModelSpec
from tests.exchange.test_export_hf import check_round_trip, their_logits
from tests.support.models import POSITIONS, decoder, our_logits, some_tokens
from tests.support.tokenizers import KINDS

# Local and global layers
PATTERN = {"depth": 3, "sliding_window": 5, "layer_pattern": ["local", "global"]}
PATTERNS: dict[str, tuple[dict[str, Any], str]] = {
    "qk_norm": ({"qk_norm": True}, "Qwen3ForCausalLM"),
    "plain": ({}, "SmolLM3ForCausalLM"),
    "gelu": ({"ffn": "gelu", "bias": True}, "SmolLM3ForCausalLM"),
    "softcap": ({"logit_softcap": 3.0}, "VaultGemmaForCausalLM"),
    "local base": ({"local_rope_base": 50.0}, "GraniteSWAForCausalLM"),
    "local base, gelu": ({"local_rope_base": 50.0, "ffn": "gelu"}, "GraniteSWAForCausalLM"),
    "local base, wide window": (
        {"local_rope_base": 50.0, "sliding_window": POSITIONS, "bias": True},
        "GraniteSWAForCausalLM",
    ),
    "sinks": ({"attention_sinks": True}, "GraniteSWAForCausalLM"),
    "sinks, no window": (
        {"attention_sinks": True, "sliding_window": None, "layer_pattern": None},
        "GraniteSWAForCausalLM",
    ),
    "multipliers": ({"residual_multiplier": 0.3, "logits_scaling": 3.0}, "GraniteSWAForCausalLM"),
    "wide window": ({"sliding_window": POSITIONS}, "LlamaForCausalLM"),
    "all local": (
        {"layer_pattern": ["local"], "local_rope_base": 50.0},
        "MistralForCausalLM",
    ),
}


def round_trip(root: Path, **options: Any) -> str:
    """Compare logits and weights after an export; returns the architecture."""
    KINDS["byte_level"](root / "tokenizer.json")
    return check_round_trip(*decoder(**options), root, root / "tokenizer.json")


@pytest.mark.parametrize(
    ("options", "architecture"),
    [
        ({}, "ArceeForCausalLM"),
        ({"qk_norm": True}, "ApertusForCausalLM"),
        ({"sliding_window": 5}, "SmolLM3ForCausalLM"),
        ({"qk_norm": True, "bias": True}, "HYV3ForCausalLM"),
        (PATTERN | {"local_rope_base": 50.0}, "GraniteSWAForCausalLM"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_squared_relu_round_trips_with_equal_logits(
    options: dict[str, Any], architecture: str, tmp_path: Path
) -> None:
    assert round_trip(tmp_path, ffn="relu2", **options) == architecture


@pytest.mark.parametrize("case", PATTERNS)
def test_local_and_global_layers_round_trip_with_equal_logits(case: str, tmp_path: Path) -> None:
    options, architecture = PATTERNS[case]
    assert round_trip(tmp_path, **PATTERN | options) == architecture


MUP = {"parametrization": "mup", "base_width": 8}
COMPLETEP = {"parametrization": "completep", "base_width": 24, "base_depth": 3, "bias": True}


@pytest.mark.parametrize(
    ("options", "architecture"),
    [
        (MUP | {"qk_norm": True}, "Qwen3ForCausalLM"),
        (MUP | {"qk_norm": True, "tied_embeddings": True}, "Qwen3ForCausalLM"),
        (MUP | {"base_head_dim": 2}, "LlamaForCausalLM"),
        (COMPLETEP | {"base_head_dim": 5}, "LlamaForCausalLM"),
        (COMPLETEP | {"ffn": "relu2", "qk_norm": True}, "HYV3ForCausalLM"),
        (COMPLETEP | {"sliding_window": 5}, "SmolLM3ForCausalLM"),
        (MUP | {"logit_softcap": 3.0, "tied_embeddings": True}, "VaultGemmaForCausalLM"),
        (MUP | {"attention_sinks": True, "base_head_dim": 2}, "GraniteSWAForCausalLM"),
        ({"residual_multiplier": 0.3, "logits_scaling": 3.0, "qk_norm": True}, "Qwen3ForCausalLM"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_multipliers_are_part_of_the_weights_where_there_is_no_key(
    options: dict[str, Any], architecture: str, tmp_path: Path
) -> None:
    assert round_trip(tmp_path, **options) == architecture


def test_a_folded_model_has_equal_logits_to_the_last_bits(tmp_path: Path) -> None:
    """Powers of two round nothing; what is left is the order of sums."""
    config, model = decoder(**MUP, qk_norm=True, residual_multiplier=0.5, tied_embeddings=True)
    KINDS["byte_level"](tmp_path / "tokenizer.json")
    assert check_round_trip(config, model, tmp_path, tmp_path / "tokenizer.json")
    tokens = some_tokens(config.model.vocab_size, 8)
    ours, theirs = our_logits(model, tokens), their_logits(tmp_path / "hf", tokens)
    assert float((ours - theirs).norm() / ours.norm()) < 1e-6
    assert not (tmp_path / "hf" / EXACT).exists()


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ({"attention_gate": "head"}, "attention_gate = head"),
        ({"attention_gate": "element"}, "attention_gate = element"),
        ({"value_residual": True}, "value_residual = true"),
    ],
)
def test_options_of_no_architecture_are_refused_by_name(option: dict[str, Any], name: str) -> None:
    config, _ = decoder(**option)
    with pytest.raises(CheckpointError, match=f"has model.{name}; a model"):
        choose_architecture(ModelSpec.from_config(config))


@pytest.mark.parametrize("option", [{"qk_norm": True}, {"logit_softcap": 3.0}])
def test_options_that_only_granite_has_are_refused_by_name(option: dict[str, Any]) -> None:
    config, _ = decoder(**PATTERN, local_rope_base=50.0, attention_sinks=True, **option)
    message = (
        f"model.{next(iter(option))}.* together with model.local_rope_base = 50 together with"
        " model.attention_sinks = true;"
    )
    with pytest.raises(CheckpointError, match=message):
        choose_architecture(ModelSpec.from_config(config))
