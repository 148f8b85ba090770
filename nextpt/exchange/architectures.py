"""Architectures of the transformers library that compute a model of nextpt, and their config.json.

Each was chosen by reading its forward pass: pre-norm, full rotary embeddings over halves, RMSNorm
with statistics in fp32, and no operation that cannot be switched off. Two differences are made up
for by weights, exactly: a feed-forward without a gate becomes a gated one whose second matrix
is zero with a bias of one; and VaultGemma's embedding scale and its norms around one, see
tensors.py. Multipliers that an architecture has no key for are part of the weights before them. A
last difference has no effect: sinks that a model does not have are so low that they take nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nextpt.base.errors import CheckpointError, same_on_all_ranks
from nextpt.model import ModelSpec
from nextpt.model.rope import attention_temperature

ACTIVATIONS = {"swiglu": "silu", "gelu": "gelu", "relu2": "relu2"}  # by model.ffn
HINT = "nextpt_model"  # key of config.json that holds the model section an export was made from


@dataclass(frozen=True)
class Architecture:
    """One architecture: what it can compute, and the defaults of its config.json.

    Attributes:
        name: Class name in transformers.
        model_type: Key `model_type` of config.json.
        qk_norm: It has an RMSNorm on queries and keys.
        window: It can have a sliding window.
        mixed_windows: It can have it in some layers only.
        sinks: Its attention has sinks.
        gated: Its feed-forward has a gate.
        mlp_bias: It can have biases in the feed-forward.
        norms: Names of the norms before attention and feed-forward.
        activation: Key of the activation, and its default.
        tied: Default of tie_word_embeddings.
        theta: Default of rope_theta; None where it must be given.
        derives_head_dim: The default of head_dim is width / heads; otherwise it must be given.
        centered: Norms store w - 1, and the embedding is multiplied by sqrt(width).
    """

    name: str
    model_type: str
    qk_norm: bool = False
    window: bool = False
    mixed_windows: bool = False
    sinks: bool = False
    gated: bool = True
    mlp_bias: bool = False
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    activation: tuple[str, str] = ("hidden_act", "silu")
    tied: bool = False
    theta: float | None = 10000.0
    derives_head_dim: bool = True
    centered: bool = False


LLAMA = Architecture("LlamaForCausalLM", "llama", mlp_bias=True)
MISTRAL = Architecture("MistralForCausalLM", "mistral", window=True)
QWEN3 = Architecture(
    "Qwen3ForCausalLM",
    "qwen3",
    qk_norm=True,
    window=True,
    mixed_windows=True,
    derives_head_dim=False,
)
ARCEE = Architecture(
    "ArceeForCausalLM",
    "arcee",
    gated=False,
    mlp_bias=True,
    activation=("hidden_act", "relu2"),
)
APERTUS = Architecture(
    "ApertusForCausalLM",
    "apertus",
    qk_norm=True,
    gated=False,
    activation=("hidden_act", "xielu"),
    norms=("attention_layernorm", "feedforward_layernorm"),
    theta=None,
)
SMOLLM3 = Architecture(
    "SmolLM3ForCausalLM",
    "smollm3",
    window=True,
    mixed_windows=True,
    mlp_bias=True,
    tied=True,
    theta=None,
)
GRANITE_SWA = replace(SMOLLM3, name="GraniteSWAForCausalLM", model_type="granite_swa", sinks=True)
HUNYUAN3 = Architecture(
    "HYV3ForCausalLM", "hy_v3", qk_norm=True, mlp_bias=True, theta=None, derives_head_dim=False
)
VAULTGEMMA = Architecture(
    "VaultGemmaForCausalLM",
    "vaultgemma",
    window=True,
    mixed_windows=True,
    tied=True,
    derives_head_dim=False,
    norms=("input_layernorm", "pre_feedforward_layernorm"),
    activation=("hidden_activation", "gelu_pytorch_tanh"),
    centered=True,
)
ARCHITECTURES = {
    a.model_type: a
    for a in (
        LLAMA,
        MISTRAL,
        QWEN3,
        ARCEE,
        APERTUS,
        SMOLLM3,
        GRANITE_SWA,
        HUNYUAN3,
        VAULTGEMMA,
    )
}


def choose_architecture(spec: ModelSpec) -> Architecture:
    """Choose the architecture that computes the same logits.

    Args:
        spec: Shape of the model.

    Raises:
        CheckpointError: No architecture has these options together; they are named.
    """
    gated, window = spec.ffn == "swiglu", spec.effective_window
    options = [(f"ffn = {spec.ffn}", not gated), ("bias = true", spec.bias)]
    if spec.attention_gate != "none":
        raise _impossible([f"attention_gate = {spec.attention_gate}"])
    if spec.value_residual:
        raise _impossible(["value_residual = true"])
    of_granite = _options_of_granite(spec)
    others = [name for name, is_set in options if is_set]
    has_multipliers = (spec.residual_multiplier, spec.logits_scaling) != (1.0, 1.0)
    if spec.logit_softcap is not None:
        others += ["qk_norm = true"] * spec.qk_norm + of_granite
        if others:
            raise _impossible(["logit_softcap", *others])
        if spec.width % spec.heads:
            raise _impossible(
                ["logit_softcap", f"head_dim = {spec.head_dim} (width is no multiple of heads)"]
            )
        return VAULTGEMMA
    if spec.qk_norm:
        if of_granite:
            raise _impossible(["qk_norm = true", *of_granite])
        if window and others:
            raise _impossible(["qk_norm = true", f"sliding_window = {window}", *others])
        return HUNYUAN3 if spec.bias else QWEN3 if gated else APERTUS
    if of_granite or has_multipliers:
        return GRANITE_SWA
    whole = spec.width % spec.heads == 0
    if window or not whole:
        return SMOLLM3 if others or spec.has_mixed_windows else MISTRAL
    return LLAMA if gated else ARCEE


def _options_of_granite(spec: ModelSpec) -> list[str]:
    """Options of a model that only GraniteSWA has."""
    options = [
        (f"local_rope_base = {spec.local_rope_base:g}", len(set(spec.rope_bases)) > 1),
        ("attention_sinks = true", spec.attention_sinks),
    ]
    return [name for name, is_set in options if is_set]


def _impossible(options: list[str]) -> CheckpointError:
    return same_on_all_ranks(
        CheckpointError(
            f"no architecture of transformers has model.{' together with model.'.join(options)}; a"
            " model with these options cannot be exported to it (docs/export.md lists what can)"
        )
    )


def hf_config(spec: ModelSpec, *, start_id: int, end_id: int, dtype: str) -> dict[str, Any]:
    """Make the config.json of the architecture that `choose_architecture` returns.

    Args:
        spec: Shape of the model.
        start_id: Token that begins a document.
        end_id: Token that ends a document.
        dtype: "float32" or "bfloat16".
    """
    architecture = choose_architecture(spec)
    by_weights = spec.ffn != "swiglu" and architecture.gated
    return {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.width,
        "intermediate_size": spec.ffn_width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        architecture.activation[0]: ACTIVATIONS[spec.ffn],
        "max_position_embeddings": spec.max_position,
        "initializer_range": spec.init_std,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied_embeddings and not architecture.centered,
        "attention_bias": spec.bias,
        "attention_dropout": 0.0,
        "use_cache": True,
        **({"mlp_bias": spec.bias or by_weights} if architecture.mlp_bias else {}),
        **_rope(spec),
        **_own_keys(spec, architecture),
        "bos_token_id": start_id,
        "eos_token_id": end_id,
        "pad_token_id": None,
        "dtype": dtype,
        "torch_dtype": dtype,  # releases before 4.56 read the latter
        HINT: spec.to_json(),
    }


def _rope(spec: ModelSpec) -> dict[str, Any]:
    """Rotary keys: release 5 of transformers reads rope_parameters, older ones the other two."""
    scaling, base = spec.rope_scaling, spec.rope_bases[-1]
    if scaling is None:
        return {
            "rope_theta": base,
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": base},
        }
    keys: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        keys["original_max_position_embeddings"] = scaling.original_max_position
    if scaling.kind == "llama3":
        keys |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
        }
    if scaling.kind == "yarn":
        keys |= {
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "attention_factor": attention_temperature(scaling),
            "truncate": True,
        }
    return {
        "rope_theta": base,
        "rope_scaling": keys,
        "rope_parameters": keys | {"rope_theta": base},
    }


def _own_keys(spec: ModelSpec, architecture: Architecture) -> dict[str, Any]:
    """Keys that only this architecture has."""
    window = spec.effective_window
    layers = [
        "sliding_attention" if window and kind == "local" else "full_attention"
        for kind in spec.layer_pattern
    ]
    if architecture is GRANITE_SWA:
        return {
            "sliding_window": window or spec.max_position,
            # A window that hides nothing stays: its layers have a rotary base of their own
            "layer_types": [
                "sliding_attention" if kind == "local" else "full_attention"
                for kind in spec.layer_pattern
            ],
            "layer_rope_theta": [*spec.rope_bases],
            "attention_multiplier": spec.head_dim**-0.5,
            "residual_multiplier": spec.effective_residual_multiplier,
            "logits_scaling": spec.effective_logits_scaling,
            "embedding_multiplier": 1.0,
        }
    if architecture is MISTRAL:
        return {"sliding_window": window}
    if architecture is QWEN3:
        return {
            "use_sliding_window": bool(window),
            "sliding_window": window,
            "max_window_layers": 0 if window else spec.depth,
            "layer_types": layers,
        }
    if architecture is SMOLLM3:
        return {
            "use_sliding_window": bool(window),
            "sliding_window": window,
            "layer_types": layers,
            "no_rope_layers": [1] * spec.depth,
        }
    if architecture is HUNYUAN3:
        return {"mlp_layer_types": ["dense"] * spec.depth}
    if architecture is VAULTGEMMA:
        # It always builds a mask for a window; no layer uses it where all are full.
        return {
            "sliding_window": window or spec.max_position,
            "layer_types": layers,
            "query_pre_attn_scalar": spec.head_dim,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": spec.logit_softcap,
        }
    return {}
