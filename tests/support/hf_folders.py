"""Hugging Face folders for tests: written by transformers, or exported by nextpt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nextpt.exchange import (
    export_hf,
)
from tests.support.models import checkpoint_of, decoder
from tests.support.tokenizers import KINDS

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
TRANSFORMERS_MODELS = {
    "llama": ("LlamaConfig", {}),
    "llama, tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama 3.1": (
        "LlamaConfig",
        {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3, yarn": ("Qwen3Config", {"head_dim": 16, "rope_parameters": YARN}),
    "qwen3, window": (
        "Qwen3Config",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
    ),
    "qwen3, pattern": (
        "Qwen3Config",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": 9, "head_dim": 12}),
    "mistral, no window": ("MistralConfig", {"sliding_window": None}),
    "granite": (
        "GraniteSWAConfig",
        {
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"],
            "layer_rope_theta": [50.0, 1e4],
            "attention_multiplier": 8**-0.5,
            "residual_multiplier": 0.22,
            "logits_scaling": 2.0,
        },
    ),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 1], "pad_token_id": None}),
    "arcee": ("ArceeConfig", {"hidden_act": "gelu"}),
    "arcee, squared relu": ("ArceeConfig", {}),
    "hunyuan 3": (
        "HYV3Config",
        {
            "head_dim": 8,
            "mlp_layer_types": ["dense", "dense"],
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
}


def save_transformers_model(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """Make and save a model with transformers; no parameter has its initial 0 or 1."""
    name, keys = TRANSFORMERS_MODELS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**SMALL | keys, initializer_range=0.2)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.empty_like(p).uniform_(-0.5, 0.5))
    model = model.to(dtype)
    model.save_pretrained(folder)
    return model.float()


def edit_config(folder: Path, **keys: Any) -> None:
    """Set keys of config.json; None removes a key."""
    values = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in values.items() if v is not None or k not in keys})
    )


def export_model(tmp_path: Path, **model: Any) -> Path:
    """Export a small decoder with a tokenizer."""
    KINDS["byte_level"](tmp_path / "tokenizer.json")
    export_hf(
        checkpoint_of(*decoder(**model), tmp_path / "checkpoints"),
        tmp_path / "tokenizer.json",
        tmp_path / "hf",
    )
    return tmp_path / "hf"
