"""Which architecture of the transformers library computes what a model section describes, and its config.json.

Each was chosen by reading its forward pass: pre-norm, full rotary embeddings over halves, RMSNorm
with statistics in fp32, and nothing that cannot be set to nothing. Two things are done by weights,
exactly: a GELU feed-forward without a gate in a gated one whose second matrix is zero with a bias
of one; and VaultGemma's embedding scale and its norms around one, see tensors.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nextpt.base.errors import CheckpointError
from nextpt.config import ModelSection
from nextpt.model.rope import attention_temperature

HINT = "nextpt_model"  # key of config.json that holds the model section an export was made from


@dataclass(frozen=True)
class Architecture:
    """One architecture. What it can do and how its config.json says so.

    gated: its feed-forward has a gate. mlp_bias: it can have biases there. whole_heads: its width
    must be a multiple of its heads. norms: names of the norms before attention and feed-forward.
    activation: the key of the activation, and what holds when it is missing. tied, theta: what
    holds when tie_word_embeddings or rope_theta is missing; None: they must be there.
    derives_head_dim: width / heads when head_dim is missing. centered: norms store w - 1, and the
    embedding is multiplied by sqrt(width).
    """

    name: str
    model_type: str
    qk_norm: bool = False
    window: bool = False
    gated: bool = True
    attention_bias: bool = True
    mlp_bias: bool = False
    whole_heads: bool = False
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    activation: tuple[str, str] = ("hidden_act", "silu")
    tied: bool = False
    theta: float | None = 10000.0
    derives_head_dim: bool = True
    centered: bool = False


LLAMA = Architecture("LlamaForCausalLM", "llama", mlp_bias=True, whole_heads=True)
MISTRAL = Architecture("MistralForCausalLM", "mistral", window=True, attention_bias=False)
QWEN3 = Architecture("Qwen3ForCausalLM", "qwen3", qk_norm=True, window=True, derives_head_dim=False)
ARCEE = Architecture(
    "ArceeForCausalLM",
    "arcee",
    gated=False,
    mlp_bias=True,
    whole_heads=True,
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
    "SmolLM3ForCausalLM", "smollm3", window=True, mlp_bias=True, tied=True, theta=None
)
HUNYUAN3 = Architecture(
    "HYV3ForCausalLM", "hy_v3", qk_norm=True, mlp_bias=True, theta=None, derives_head_dim=False
)
VAULTGEMMA = Architecture(
    "VaultGemmaForCausalLM",
    "vaultgemma",
    window=True,
    whole_heads=True,
    tied=True,
    derives_head_dim=False,
    norms=("input_layernorm", "pre_feedforward_layernorm"),
    activation=("hidden_activation", "gelu_pytorch_tanh"),
    centered=True,
)
ARCHITECTURES = {
    a.model_type: a for a in (LLAMA, MISTRAL, QWEN3, ARCEE, APERTUS, SMOLLM3, HUNYUAN3, VAULTGEMMA)
}


def effective_window(c: ModelSection, max_position: int) -> int | None:
    """The window, unless it is so wide that it hides nothing."""
    return c.sliding_window if c.sliding_window and c.sliding_window < max_position else None


def choose_architecture(c: ModelSection, max_position: int) -> Architecture:
    """The architecture that computes the same logits.

    Raises CheckpointError naming the options that none has together.
    """
    gelu, window = c.ffn == "gelu", effective_window(c, max_position)
    wanted = [("ffn = gelu", gelu), ("bias = true", c.bias)]
    if c.logit_softcap is not None:
        others = [key for key, asked in [*wanted, ("qk_norm = true", c.qk_norm)] if asked]
        if others:
            raise _impossible(["logit_softcap", *others])
        if c.width % c.heads:
            raise _impossible(
                ["logit_softcap", f"head_dim = {c.head_dim} (width is no multiple of heads)"]
            )
        return VAULTGEMMA
    others = [key for key, asked in wanted if asked]
    if c.qk_norm:
        if window and others:
            raise _impossible(["qk_norm = true", f"sliding_window = {window}", *others])
        return HUNYUAN3 if c.bias else APERTUS if gelu else QWEN3
    whole = c.width % c.heads == 0
    if window or not whole:
        return SMOLLM3 if others else MISTRAL
    return ARCEE if gelu else LLAMA


def _impossible(options: list[str]) -> CheckpointError:
    error = CheckpointError(
        f"no architecture of transformers has model.{' together with model.'.join(options)}; a"
        " model with these options cannot be exported to it (docs/export.md lists what can)"
    )
    error.every_rank = False
    return error


def hf_config(
    c: ModelSection, max_position: int, *, start_id: int, end_id: int, dtype: str
) -> dict[str, Any]:
    """config.json of the architecture that `choose_architecture` gives. dtype: "float32" or "bfloat16"."""
    architecture = choose_architecture(c, max_position)
    by_weights = c.ffn == "gelu" and architecture.gated
    return {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "intermediate_size": c.ffn_width_,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads_,
        "head_dim": c.head_dim_,
        architecture.activation[0]: "gelu" if c.ffn == "gelu" else "silu",
        "max_position_embeddings": max_position,
        "initializer_range": c.init_std,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied_embeddings and not architecture.centered,
        "attention_bias": c.bias,
        "attention_dropout": 0.0,
        "use_cache": True,
        **({"mlp_bias": c.bias or by_weights} if architecture.mlp_bias else {}),
        **_rope(c),
        **_own_keys(c, architecture, max_position),
        "bos_token_id": start_id,
        "eos_token_id": end_id,
        "pad_token_id": None,
        "dtype": dtype,
        "torch_dtype": dtype,  # releases before 4.56 read the latter
        HINT: (
            c.model_dump(mode="json", exclude={"attention", "cross_entropy"})
            | {"max_position": max_position}
        ),
    }


def _rope(c: ModelSection) -> dict[str, Any]:
    """Release 5 of transformers reads rope_parameters, those before it rope_theta and rope_scaling."""
    scaling = c.rope_scaling
    if scaling is None:
        return {
            "rope_theta": c.rope_base,
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_base},
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
        "rope_theta": c.rope_base,
        "rope_scaling": keys,
        "rope_parameters": keys | {"rope_theta": c.rope_base},
    }


def _own_keys(c: ModelSection, architecture: Architecture, max_position: int) -> dict[str, Any]:
    """Keys that one architecture has and others do not."""
    window = effective_window(c, max_position)
    layers = ["sliding_attention" if window else "full_attention"] * c.depth
    if architecture is MISTRAL:
        return {"sliding_window": window}
    if architecture is QWEN3:
        return {
            "use_sliding_window": bool(window),
            "sliding_window": window,
            "max_window_layers": 0 if window else c.depth,
            "layer_types": layers,
        }
    if architecture is SMOLLM3:
        return {
            "use_sliding_window": bool(window),
            "sliding_window": window,
            "layer_types": layers,
            "no_rope_layers": [1] * c.depth,
        }
    if architecture is HUNYUAN3:
        return {"mlp_layer_types": ["dense"] * c.depth}
    if architecture is VAULTGEMMA:
        # It makes a mask for a window in any case; no layer uses it where all are full.
        return {
            "sliding_window": window or max_position,
            "layer_types": layers,
            "query_pre_attn_scalar": c.head_dim_,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": c.logit_softcap,
        }
    return {}
