"""Import from Hugging Face: inexpressible models are refused by key, and no code is run."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nextpt.base.errors import CheckpointError
from nextpt.config import RopeScaling
from nextpt.exchange import (
    HFWeights,
    load_hf,
)
from nextpt.exchange.architectures import HINT, hf_config
from nextpt.exchange.reading import read_config
from tests.support.hf_folders import (
    LLAMA3,
    YARN,
    edit_config,
    export_model,
    save_transformers_model,
)

REFUSED = {
    "model_type": (
        "llama",
        {"model_type": "gpt2"},
        "model_type = 'gpt2' cannot be imported; these can: apertus",
    ),
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "half biases": (
        "llama",
        {"attention_bias": True},
        "attention_bias = True cannot be imported: mlp_bias is False",
    ),
    "rope type": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        "rope_type = 'dynamic'",
    ),
    "rope key": ("llama", {"rope_parameters": YARN | {"mscale": 0.7}}, "rope_scaling.mscale = 0.7"),
    "yarn attention": (
        "llama",
        {"rope_parameters": YARN | {"attention_factor": 1.0}},
        "rope_scaling.attention_factor = 1.0",
    ),
    "yarn truncation": (
        "llama",
        {"rope_parameters": YARN | {"truncate": False}},
        "rope_scaling.truncate = False",
    ),
    "rope factor": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 0.5}},
        "rope_scaling = ",
    ),
    "llama3 factors": (
        "llama",
        {"rope_parameters": {k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}},
        "key rope_scaling.low_freq_factor is missing",
    ),
    "part of a head": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "unknown key": (
        "llama",
        {"embedding_multiplier": 12.0},
        "embedding_multiplier = 12.0 cannot be imported: nextpt does not know it",
    ),
    "quantised": ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    "code": ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling.M"}}, "auto_map"),
    "missing key": ("llama", {"rms_norm_eps": None}, "key rms_norm_eps is missing"),
    "no number": (
        "llama",
        {"hidden_size": "wide"},
        "hidden_size = 'wide' cannot be imported: a number above 0",
    ),
    "missing head_dim": ("qwen3", {"head_dim": None}, "key head_dim is missing"),
    "odd head_dim": ("qwen3", {"head_dim": 15}, "head_dim = 15 is odd"),
    "mixed windows": (
        "qwen3",
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types = .* cannot be imported: it names a window, but sliding_window gives none",
    ),
    "unknown layers": (
        "qwen3",
        {"layer_types": ["full_attention", "chunked_attention"]},
        "layer_types = .* sliding_attention or full_attention for every layer is expected",
    ),
    "multiplier": (
        "granite",
        {"attention_multiplier": 1.0},
        "attention_multiplier = 1.0 cannot be imported: only 0.35",
    ),
    "embedding multiplier": (
        "granite",
        {"embedding_multiplier": 12.0},
        "embedding_multiplier = 12.0 cannot be imported: only 1.0 can be expressed",
    ),
    "layers without rotation": (
        "granite",
        {"layer_rope_theta": [50.0, 0]},
        r"layer_rope_theta = \[50.0, 0\] cannot be imported: one base per kind of layer",
    ),
    "no rotation": ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers = "),
    "half a layer": (
        "llama",
        {"num_hidden_layers": 2.5},
        "num_hidden_layers = 2.5 cannot be imported: a whole number up to 10,000",
    ),
    "bases per layer type": (
        "qwen3",
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        "rope_scaling.full_attention = ",
    ),
    "scaling no object": (
        "llama",
        {"rope_scaling": 5},
        "has a value that no LlamaForCausalLM has",
    ),
    "std": ("llama", {"initializer_range": 0}, "init_std = 0: Input should be greater than 0"),
    "experts": ("hunyuan 3", {"mlp_layer_types": ["dense", "sparse"]}, "mlp_layer_types = "),
    "shape": (
        "llama",
        {"intermediate_size": 50},
        r"model.layers.0.mlp.gate_proj.weight is F32 \(48, 32\), expected floats \(50, 32\)",
    ),
    "missing tensor": (
        "llama",
        {"num_hidden_layers": 3},
        "has no tensor model.layers.2.input_layernorm.weight",
    ),
    "extra tensor": (
        "llama",
        {"num_hidden_layers": 1},
        "has a tensor model.layers.1.input_layernorm.weight that the model",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_keys_that_cannot_be_expressed_are_named(case: str, tmp_path: Path) -> None:
    kind, keys, message = REFUSED[case]
    save_transformers_model(tmp_path / "hf", kind)
    edit_config(tmp_path / "hf", **keys)
    with pytest.raises(CheckpointError, match=message) as raised:
        HFWeights(tmp_path / "hf")
    assert "\n" not in str(raised.value)


PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Qwen3-0.6B": (
        {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 1024,
            "initializer_range": 0.02,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "model_type": "qwen3",
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.51.0",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        {
            "width": 1024,
            "kv_heads": 8,
            "head_dim": 128,
            "qk_norm": True,
            "tied_embeddings": True,
            "rope_base": 1e6,
            "norm_eps": 1e-6,
        },
    ),
    "Llama-3.2-1B": (
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.45.0.dev0",
            "use_cache": True,
            "vocab_size": 128256,
        },
        {
            "depth": 16,
            "head_dim": 64,
            "tied_embeddings": True,
            "max_position": 131072,
            "rope_scaling": RopeScaling(
                kind="llama3",
                factor=32.0,
                original_max_position=8192,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
            ),
        },
    ),
    "Mistral-7B-v0.1": (
        {
            "architectures": ["MistralForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "model_type": "mistral",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.34.0.dev0",
            "use_cache": True,
            "vocab_size": 32000,
        },
        {
            "ffn_width": 14336,
            "head_dim": 128,
            "sliding_window": 4096,
            "tied_embeddings": False,
            "qk_norm": False,
            "rope_scaling": None,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name: str, tmp_path: Path) -> None:
    keys, expected = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(keys))
    _, spec = read_config(tmp_path)
    assert {key: getattr(spec, key) for key in expected} == expected
    assert spec.max_position == keys["max_position_embeddings"]


ANY_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["rope_type", "factor", "rope_theta", "type", "x"]), inner, max_size=4
        )
    ),
    max_leaves=5,
)


@pytest.mark.thorough
@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(sorted(PUBLISHED)), data=st.data())
def test_any_value_of_any_key_is_read_or_refused_in_one_line(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    values: dict[str, Any] = dict(PUBLISHED[name][0])
    keys = st.sampled_from(
        [
            *values,
            "layer_types",
            "rope_parameters",
            "no_rope_layers",
            HINT,
            "partial_rotary_factor",
            "other",
        ]
    )
    for key in data.draw(st.lists(keys, min_size=1, max_size=3, unique=True)):
        values[key] = data.draw(ANY_VALUE, key)
    folder = tmp_path_factory.getbasetemp()
    (folder / "config.json").write_text(json.dumps(values))
    refusal = "config.json"
    try:
        _, spec = read_config(folder)
        assert hf_config(spec, start_id=0, end_id=0, dtype="float32")["model_type"]
    except CheckpointError as error:
        refusal = str(error)
    assert "\n" not in refusal and "config.json" in refusal


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _outside(folder: Path) -> None:
    os.rename(folder / "model.safetensors", folder.parent / "away.safetensors")
    index = {
        "weight_map": dict.fromkeys(
            load_file(folder.parent / "away.safetensors"), "../away.safetensors"
        )
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _integers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "does not exist; give a local Hugging Face folder"),
    "no config": (
        lambda f: (f / "config.json").unlink(),
        "config.json is not the config of a Hugging Face model",
    ),
    "config a list": (
        lambda f: (f / "config.json").write_text("[1]"),
        "config.json is not the config",
    ),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not the config"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors$"),
    "pickle": (_pickled, "pytorch_model.bin is a pickle, which can run code and is not read"),
    "truncated": (
        lambda f: os.truncate(f / "model.safetensors", 5000),
        "model.safetensors cannot be read",
    ),
    "empty": (
        lambda f: os.truncate(f / "model.safetensors", 0),
        "model.safetensors cannot be read",
    ),
    "index outside": (
        _outside,
        "'../away.safetensors', which is not a safetensors file of this folder",
    ),
    "index empty": (
        lambda f: (f / "model.safetensors.index.json").write_text("[]"),
        "index.json cannot be read",
    ),
    "index wrong": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            '{"weight_map": {"x": "model.safetensors"}}'
        ),
        "says that model.safetensors holds x, but it does not",
    ),
    "integers": (_integers, "model.norm.weight is I8"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folders_give_one_clear_error(case: str, tmp_path: Path) -> None:
    save_transformers_model(tmp_path / "hf", "llama")
    damage, message = DAMAGE[case]
    damage(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=message) as raised:
        load_hf(tmp_path / "hf")
    assert "\n" not in str(raised.value)


def test_the_architecture_with_capped_logits_is_read_only_as_exported(tmp_path: Path) -> None:
    folder = export_model(tmp_path, logit_softcap=2.0)
    edit_config(folder, final_logit_softcapping=5.0)
    with pytest.raises(
        CheckpointError,
        match=(
            "model_type = 'vaultgemma' cannot be imported: it is read back only as nextpt"
            " exported it"
        ),
    ):
        load_hf(folder)


@pytest.mark.thorough
def test_a_feed_forward_that_got_a_gate_is_refused(tmp_path: Path) -> None:
    folder = export_model(tmp_path, ffn="gelu", sliding_window=5)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.bias"] *= 1.5
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"model.layers.0.mlp.up_proj.bias is no longer all 1"
    ):
        load_hf(folder)


@pytest.mark.thorough
def test_importing_runs_no_foreign_code(tmp_path: Path) -> None:
    """Nothing is unpickled, compiled from the folder or started while a folder is read."""
    folder = export_model(tmp_path)
    (folder / "modeling_llama.py").write_text("raise SystemExit('ran')")
    events: list[str] = []
    active = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if active and event in (
            "pickle.find_class",
            "subprocess.Popen",
            "os.system",
            "os.exec",
            "exec",
            "compile",
        ):
            events.append(f"{event} {arguments}"[:200])

    load_hf(folder)  # lazy imports of nextpt happen here
    sys.addaudithook(hook)
    load_hf(folder)
    active = False
    assert events == []
