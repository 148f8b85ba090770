"""Export of layer options to Hugging Face: the same logits in transformers, or a refusal by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nextpt.base.errors import CheckpointError
from nextpt.exchange.architectures import choose_architecture
from nextpt.model import ModelSpec
from tests.exchange.test_export_hf import check_round_trip, tokenizer_file  # noqa: F401
from tests.support.models import POSITIONS, decoder

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
    "wide window": ({"sliding_window": POSITIONS}, "LlamaForCausalLM"),
    "all local": (
        {"layer_pattern": ["local"], "local_rope_base": 50.0},
        "MistralForCausalLM",
    ),
}


@pytest.mark.parametrize("case", PATTERNS)
def test_local_and_global_layers_round_trip_with_equal_logits(
    case: str, tmp_path: Path, tokenizer_file: Path
) -> None:
    options, architecture = PATTERNS[case]
    name = check_round_trip(*decoder(**PATTERN | options), tmp_path, tokenizer_file)
    assert name == architecture


@pytest.mark.parametrize("option", [{"qk_norm": True}, {"logit_softcap": 3.0}])
def test_a_base_of_local_layers_is_refused_by_name(option: dict[str, Any]) -> None:
    config, _ = decoder(**PATTERN, local_rope_base=50.0, **option)
    message = f"model.{next(iter(option))}.* together with model.local_rope_base = 50;"
    with pytest.raises(CheckpointError, match=message):
        choose_architecture(ModelSpec.from_config(config))
