"""Import from Hugging Face: the same logits, the same weights bit by bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nextpt.exchange import (
    HFWeights,
    config_from_hf,
    different_keys,
    load_hf,
    same_vocabulary,
)
from nextpt.exchange.architectures import HINT
from tests.support.hf_folders import (
    LLAMA3,
    TRANSFORMERS_MODELS,
    edit_config,
    export_model,
    save_transformers_model,
)
from tests.support.models import decoder, our_logits, some_tokens
from tests.support.tokenizers import KINDS


@pytest.mark.thorough
@pytest.mark.parametrize("kind", TRANSFORMERS_MODELS)
def test_models_of_transformers_have_the_same_logits(kind: str, tmp_path: Path) -> None:
    reference = save_transformers_model(tmp_path / "hf", kind)
    model = load_hf(tmp_path / "hf")
    tokens = some_tokens(96, 60)
    with torch.no_grad():
        expected = reference(tokens).logits
    torch.testing.assert_close(our_logits(model, tokens), expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    reference = save_transformers_model(tmp_path / "hf", "qwen3", dtype)
    model = load_hf(tmp_path / "hf")
    assert torch.equal(model.embed_tokens.weight, reference.model.embed_tokens.weight)
    assert torch.equal(
        model.blocks[1].ffn.down_proj.weight, reference.model.layers[1].mlp.down_proj.weight
    )


def test_configs_of_old_releases_are_read(tmp_path: Path) -> None:
    save_transformers_model(tmp_path / "new", "llama 3.1")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    edit_config(
        tmp_path / "old",
        rope_parameters=None,
        rope_theta=5e5,
        torch_dtype="float32",
        pretraining_tp=1,
        head_dim=None,
        rope_scaling={k: v for k, v in LLAMA3.items() if k not in ("rope_theta", "rope_type")}
        | {"type": "llama3"},
    )
    a, b = load_hf(tmp_path / "new"), load_hf(tmp_path / "old")
    assert a.spec == b.spec
    assert torch.equal(our_logits(a, some_tokens(96)), our_logits(b, some_tokens(96)))


def test_an_edited_export_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    """The hint of an export is used only while it agrees with the other keys."""
    folder = export_model(tmp_path, rope_base=1e4)
    edit_config(folder, rope_theta=5e5, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert load_hf(folder).spec.rope_base == 5e5
    edit_config(folder, **{HINT: {"vocab_size": -1}})
    assert load_hf(folder).spec.rope_base == 5e5


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {
            "kind": "yarn",
            "factor": 3.0,
            "original_max_position": 1000,
            "beta_fast": 4.0,
            "beta_slow": 2.0,
        },
    ],
)
def test_the_keys_for_old_releases_describe_the_same_model(
    scaling: dict[str, Any] | None, tmp_path: Path
) -> None:
    folder = export_model(tmp_path, rope_base=321.0, rope_scaling=scaling)
    whole = config_from_hf(HFWeights(folder))
    edit_config(folder, rope_parameters=None, dtype=None, **{HINT: None})
    assert different_keys(HFWeights(folder), whole) == ([], []) and whole.model.rope_base == 321.0


def test_exact_values_are_read_only_while_the_weights_are_unchanged(tmp_path: Path) -> None:
    """After further training of an export, its weights are read, not the exact values beside."""
    folder = export_model(tmp_path, logit_softcap=2.0)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] += 1.0
    save_file(tensors, folder / "model.safetensors")
    before, after = decoder(logit_softcap=2.0)[1], load_hf(folder)
    torch.testing.assert_close(after.final_norm.weight, before.final_norm.weight + 1.0)
    assert torch.equal(after.embed_tokens.weight, before.embed_tokens.weight)


@pytest.mark.thorough
def test_any_range_is_read_without_the_rest(tmp_path: Path) -> None:
    weights = HFWeights(export_model(tmp_path, logit_softcap=2.0, tied_embeddings=True))
    parameters = dict(decoder(logit_softcap=2.0, tied_embeddings=True)[1].named_parameters())
    assert weights.shapes() == {name: tuple(p.shape) for name, p in parameters.items()}
    for name, p in parameters.items():
        for start, stop in (
            (0, p.numel()),
            (3, 4),
            (5, p.numel() - 2),
            (p.numel() // 2, p.numel() // 2),
        ):
            assert torch.equal(weights.read(name, "weight", start, stop), p.reshape(-1)[start:stop])
        assert not weights.read(name, "exp_avg", 2, 9).any()


def test_differences_in_shape_and_in_use_are_separate(tmp_path: Path) -> None:
    weights = HFWeights(export_model(tmp_path))
    assert different_keys(weights, decoder(sliding_window=100)[0]) == ([], [])  # it hides nothing
    shapes, uses = different_keys(
        weights, decoder(depth=3, rope_base=5e5, head_dim=8, ffn_width=128)[0]
    )
    assert shapes == ["model.depth = 3, there 2"] and uses == [
        "model.rope_base = 500000.0, there 10000.0"
    ]


def test_vocabularies_are_compared_and_not_files(tmp_path: Path) -> None:
    folder = export_model(tmp_path)
    assert (folder / "tokenizer.json").read_bytes() != (tmp_path / "tokenizer.json").read_bytes()
    assert same_vocabulary(folder / "tokenizer.json", tmp_path / "tokenizer.json")
    KINDS["gpt2"](tmp_path / "other.json")
    assert not same_vocabulary(folder / "tokenizer.json", tmp_path / "other.json")
