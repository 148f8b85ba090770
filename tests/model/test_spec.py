"""ModelSpec: defaults resolved once, and the same model from a config, a spec and JSON."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextpt.config import ModelSection
from nextpt.model import ComputeOptions, Decoder, ModelSpec, build_decoder, parameter_shapes
from tests.support.datasets import tiny

SHAPE = {"vocab_size": 96, "depth": 2, "width": 48, "heads": 4}


def test_defaults_are_resolved() -> None:
    config = tiny(
        Path("none"),
        Path("none"),
        data={"sequence_length": 24},
        model=SHAPE | {"kv_heads": None, "head_dim": None, "ffn_width": None, "max_position": None},
    )
    spec = ModelSpec.from_config(config)
    # 8/3 x 48 = 128, a multiple of 64 already
    assert (spec.kv_heads, spec.head_dim, spec.ffn_width, spec.max_position) == (4, 12, 128, 24)
    gelu = ModelSpec.from_section(ModelSection(**SHAPE, ffn="gelu", max_position=9), 24)
    assert (gelu.ffn_width, gelu.max_position) == (192, 9)
    with pytest.raises(FrozenInstanceError):
        spec.depth = 3  # type: ignore[misc] # what is refused


@given(
    kv_heads=st.sampled_from([None, 1, 2, 4]),
    head_dim=st.sampled_from([None, 6, 16]),
    scaled=st.booleans(),
    window=st.sampled_from([None, 5, 64]),
    pattern=st.sampled_from([None, ["local"], ["local", "global"], ["global", "local"]]),
    base=st.sampled_from([None, 50.0]),
)
def test_a_spec_in_json_is_a_model_section_of_the_same_spec(
    kv_heads: int | None,
    head_dim: int | None,
    scaled: bool,
    window: int | None,
    pattern: list[str] | None,
    base: float | None,
) -> None:
    layers = {"sliding_window": window}
    if window is not None:
        layers |= {"layer_pattern": pattern, "local_rope_base": base}
    scaling = {"kind": "yarn", "factor": 2.0, "original_max_position": 32} if scaled else None
    section = ModelSection.model_validate(
        SHAPE | {"kv_heads": kv_heads, "head_dim": head_dim, "rope_scaling": scaling} | layers
    )
    spec = ModelSpec.from_section(section, 64)
    reread = ModelSection.model_validate(json.loads(json.dumps(spec.to_json())))
    assert ModelSpec.from_section(reread, 7) == spec and hash(spec) == hash(
        ModelSpec.from_section(reread, 7)
    )
    assert spec.effective_window == (window if window != 64 else None)


def test_a_decoder_needs_no_config_and_computes_by_its_options() -> None:
    config = tiny(
        Path("none"),
        Path("none"),
        run={"seed": 7},
        model=SHAPE | {"kv_heads": 2, "attention": "reference"},
        train={"activation_checkpointing": True, "loss_workspace_mib": 3, "loss_logits_fp32": True},
    )
    built = build_decoder(config)
    assert built.options.attention == "reference" and built.options.activation_checkpointing
    assert built.options.loss_workspace_bytes == 3 * 2**20
    plain = Decoder(ModelSpec.from_config(config), seed=7)
    assert plain.options == ComputeOptions()
    for name, parameter in built.named_parameters():
        assert plain.get_parameter(name).equal(parameter), name
    shapes = {name: tuple(p.shape) for name, p in built.named_parameters()}
    assert dict(parameter_shapes(plain.spec)) == shapes
