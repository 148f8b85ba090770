"""Reading of a Hugging Face config.json into a ModelSpec; nothing is imported or run for it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from nextpt.base.errors import CheckpointError
from nextpt.config import ModelSection, RopeScaling
from nextpt.exchange.architectures import (
    ACTIVATIONS,
    APERTUS,
    ARCHITECTURES,
    GRANITE_SWA,
    HINT,
    HUNYUAN3,
    MISTRAL,
    QWEN3,
    SMOLLM3,
    VAULTGEMMA,
    Architecture,
    hf_config,
)
from nextpt.model import ModelSpec

# Keys that do not affect what the model computes.
NEUTRAL = {
    "architectures",
    "model_type",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "attention_dropout",
    "pretraining_tp",
    "_name_or_path",
    "_attn_implementation",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "id2label",
    "label2id",
    "problem_type",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
    HINT,
}
# Keys of parts that have no effect where all layers are alike and dense, by model type.
UNUSED = {
    "hy_v3": {
        "num_experts",
        "num_local_experts",
        "num_experts_per_tok",
        "num_shared_experts",
        "moe_intermediate_size",
        "router_scaling_factor",
        "enable_moe_fp32_combine",
        "output_router_logits",
    },
    "smollm3": {"no_rope_layer_interval"},
}

KINDS = {"sliding_attention": "local", "full_attention": "global"}  # of layers
MAX_COUNTS = {"num_hidden_layers": 10_000}  # others: 2**31


def read_config(folder: Path) -> tuple[Architecture, ModelSpec]:
    """Read the config.json of a Hugging Face folder.

    Returns:
        Architecture and shape of the model.

    Raises:
        CheckpointError: It cannot be read, or our decoder cannot express a key; it is named.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
        kind = values["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not the config of a Hugging Face model: {error}; give a folder with"
            " config.json and *.safetensors"
        ) from None
    architecture = ARCHITECTURES.get(kind) if isinstance(kind, str) else None
    if architecture is None:
        raise CheckpointError(
            f"{path}: model_type = {kind!r} cannot be imported; these can:"
            f" {', '.join(sorted(ARCHITECTURES))}"
        )
    try:
        described = ConfigReader(path, values, architecture).section()
        return architecture, _as_exported(values, architecture, described, path)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{path} has a value that no {architecture.name} has: {error}"
        ) from None


def _as_exported(
    values: dict[str, Any], architecture: Architecture, described: dict[str, Any], path: Path
) -> ModelSpec:
    """Spec that the export was made from, while the other keys still agree with it.

    Otherwise the spec that the other keys describe.

    Args:
        values: Content of config.json.
        architecture: Its architecture.
        described: What the keys that transformers reads describe.
        path: The file, for messages.
    """
    hint = values.get(HINT)
    try:
        if hint is not None:
            section = ModelSection.model_validate(hint)
            spec = ModelSpec.from_section(section, hint["max_position"])
            if (
                spec.depth == described["depth"]
                and _described_by_export(spec, architecture, path) == described
            ):
                return spec
    except (ValueError, CheckpointError, TypeError, KeyError):
        pass  # it was edited: the keys that transformers reads decide
    section = _to_section(described, architecture, path)
    return ModelSpec.from_section(section, described["max_position"])


def _described_by_export(
    spec: ModelSpec, architecture: Architecture, path: Path
) -> dict[str, Any] | None:
    """What the config.json that this spec is exported to describes.

    None when that is of another architecture.
    """
    exported = hf_config(spec, start_id=0, end_id=0, dtype="float32")
    return (
        ConfigReader(path, exported, architecture).section()
        if exported["model_type"] == architecture.model_type
        else None
    )


def _to_section(described: dict[str, Any], architecture: Architecture, path: Path) -> ModelSection:
    activation = described.pop("activation")
    kinds = {
        name: ffn for ffn, name in ACTIVATIONS.items() if (ffn == "swiglu") == architecture.gated
    }
    if activation not in kinds:
        _refuse(
            path,
            architecture.activation[0],
            activation,
            f"only {' or '.join(kinds)} of this architecture can be expressed",
        )
    biases = described.pop("attention_bias"), described.pop("mlp_bias")
    if biases[0] != biases[1]:
        _refuse(
            path,
            "attention_bias",
            biases[0],
            f"mlp_bias is {biases[1]}, and only all biases or none can be expressed",
        )
    if architecture.centered:
        _refuse(
            path,
            "model_type",
            architecture.model_type,
            "it is read back only as nextpt exported it",
        )
    try:
        return ModelSection.model_validate(
            described
            | {
                "bias": biases[0],
                "ffn": kinds[activation],
                "attention_sinks": architecture.sinks,
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part} = {first['input']!r}: " for part in first["loc"][:1])
        raise CheckpointError(
            f"{path} cannot be expressed: {where}{first['msg'].removeprefix('Value error, ')}"
        ) from None


def _refuse(path: Path, key: str, value: Any, why: str) -> NoReturn:
    raise CheckpointError(f"{path}: {key} = {value!r} cannot be imported: {why}")


class ConfigReader:
    """Reads each key of a config.json once, so that a key left over is one that is not understood.

    Args:
        path: The file, for messages.
        values: Its content.
        architecture: Its architecture.
    """

    def __init__(self, path: Path, values: dict[str, Any], architecture: Architecture) -> None:
        self.path = path
        self.architecture = architecture
        self._unread = {
            k: v
            for k, v in values.items()
            if k not in NEUTRAL | UNUSED.get(architecture.model_type, set())
        }

    def section(self) -> dict[str, Any]:
        """Values of a model section, and activation, attention_bias and mlp_bias as they are given.

        Raises:
            CheckpointError: A key is missing, or our decoder cannot express it.
        """
        a = self.architecture
        width, heads, depth = (
            self._count(key) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers")
        )
        head_dim = self._take("head_dim", None)
        if head_dim is None:
            if not a.derives_head_dim:
                self._missing("head_dim")
            head_dim = width // heads
        positions = self._count("max_position_embeddings")
        section = {
            "vocab_size": self._count("vocab_size"),
            "depth": depth,
            "width": width,
            "heads": heads,
            "kv_heads": self._take("num_key_value_heads", None) or heads,
            "head_dim": head_dim,
            "ffn_width": self._count("intermediate_size"),
            "max_position": positions,
            "qk_norm": a.qk_norm,
            "tied_embeddings": self._take("tie_word_embeddings", a.tied),
            "norm_eps": self._number("rms_norm_eps"),
            "init_std": self._take("initializer_range", 0.02),
            "activation": self._take(*a.activation),
            "attention_bias": self._take("attention_bias", False),
            "mlp_bias": self._take("mlp_bias", False),
            "logit_softcap": None,
            **self._rope(positions),
            **self._windows(depth),
        }
        if a is GRANITE_SWA:
            section |= self._bases_by_layer(section)
            section |= {
                name: self._take(name, 1.0) for name in ("residual_multiplier", "logits_scaling")
            }
            self._require("embedding_multiplier", 1.0, 1.0)
            self._require("attention_multiplier", head_dim**-0.5, 1.0)
        if a is HUNYUAN3:
            self._require_in_all_layers("mlp_layer_types", "dense", depth)
        if a is VAULTGEMMA:
            section["logit_softcap"] = self._take("final_logit_softcapping", 30.0)
            self._require("attn_logit_softcapping", None, 50.0)
            self._require("query_pre_attn_scalar", head_dim, 256)
        for key, value in self._unread.items():
            if value not in (None, False, [], {}):
                self._refuse(key, value, "nextpt does not know it")
        return section

    def _take(self, key: str, default: Any) -> Any:
        return self._unread.pop(key, default)

    def _number(self, key: str) -> Any:
        if key not in self._unread:
            self._missing(key)
        value = self._unread.pop(key)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not value > 0
            or math.isinf(value)
        ):
            self._refuse(key, value, "a number above 0 is expected")
        return value

    def _count(self, key: str) -> int:
        value = self._number(key)
        if value != int(value) or value > MAX_COUNTS.get(key, 2**31):
            self._refuse(
                key, value, f"a whole number up to {MAX_COUNTS.get(key, 2**31):,} is expected"
            )
        return int(value)

    def _missing(self, key: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: key {key} is missing")

    def _refuse(self, key: str, value: Any, why: str) -> NoReturn:
        _refuse(self.path, key, value, why)

    def _require(self, key: str, expected: Any, default: Any) -> None:
        if (value := self._take(key, default)) != expected:
            self._refuse(key, value, f"only {expected} can be expressed")

    def _require_in_all_layers(self, key: str, expected: Any, depth: int) -> None:
        value = self._take(key, None)
        if value != [expected] * depth:
            self._refuse(key, value, f"only {expected!r} for every layer can be expressed")

    def _windows(self, depth: int) -> dict[str, Any]:
        """sliding_window and layer_pattern; the latter is None where all layers are alike."""
        a = self.architecture
        if not a.window:
            self._require("sliding_window", None, None)
            return {"sliding_window": None, "layer_pattern": None}
        window = self._take("sliding_window", 128 if a is GRANITE_SWA else 4096)
        layers = self._take("layer_types", None)
        if a is SMOLLM3:
            self._require_in_all_layers("no_rope_layers", 1, depth)
        if a in (QWEN3, SMOLLM3) and not self._take("use_sliding_window", False):
            window = None
        first = self._take("max_window_layers", 28) if a is QWEN3 else 0
        if layers is None:
            if a in (VAULTGEMMA, GRANITE_SWA):
                self._missing("layer_types")
            sliding = a is MISTRAL or (a is QWEN3 and window is not None)
            layers = [
                "sliding_attention" if sliding and window and i >= first else "full_attention"
                for i in range(depth)
            ]
        if len(layers) != depth or not set(layers) <= KINDS.keys():
            self._refuse("layer_types", layers, f"{' or '.join(KINDS)} for every layer is expected")
        if len(set(layers)) == 1:
            window = window if layers[0] == "sliding_attention" else None
            return {"sliding_window": window, "layer_pattern": None}
        if not a.mixed_windows:
            self._refuse("layer_types", layers, "all layers of this architecture are alike")
        if window is None:
            self._refuse("layer_types", layers, "it names a window, but sliding_window gives none")
        return {"sliding_window": window, "layer_pattern": [KINDS[kind] for kind in layers]}

    def _bases_by_layer(self, section: dict[str, Any]) -> dict[str, Any]:
        """rope_base and local_rope_base, from the rotary base of every layer."""
        key, depth = "layer_rope_theta", section["depth"]
        bases = self._take(key, None) or [section["rope_base"]] * depth
        kinds = section["layer_pattern"] or ["global"] * depth
        by_kind: dict[str, set[float]] = {}
        for kind, base in zip(kinds, bases, strict=True):
            by_kind.setdefault(kind, set()).add(base)
        if any(len(values) > 1 or 0 in values for values in by_kind.values()):
            self._refuse(key, bases, "one base per kind of layer, above 0, is expected")
        return {
            "rope_base": float(*by_kind["global"]),
            "local_rope_base": float(*by_kind["local"]) if "local" in by_kind else None,
        }

    def _rope(self, positions: int) -> dict[str, Any]:
        """rope_base and rope_scaling, from the keys of transformers 5 or those before it."""
        old = self._take("rope_scaling", None)
        keys = dict(old or self._take("rope_parameters", None) or {})
        self._take("rope_parameters", None)
        theta = self._take("rope_theta", self.architecture.theta)
        base = keys.pop("rope_theta", None) or theta
        if base is None or (self.architecture is APERTUS and not keys and old is None):
            self._missing("rope_parameters")
        for holder in (keys, self._unread):
            if (partial := holder.pop("partial_rotary_factor", None)) not in (None, 1, 1.0):
                self._refuse("partial_rotary_factor", partial, "only whole heads can be rotated")
        kind = keys.pop("rope_type", None) or keys.pop("type", None) or "default"
        keys.pop("type", None)
        if kind == "default":
            self._require_empty(keys)
            return {"rope_base": float(base), "rope_scaling": None}
        return {"rope_base": float(base), "rope_scaling": self._scaling(kind, keys, positions)}

    def _scaling(self, kind: str, keys: dict[str, Any], positions: int) -> dict[str, Any]:
        known = {
            "linear": (),
            "llama3": ("low_freq_factor", "high_freq_factor"),
            "yarn": ("beta_fast", "beta_slow"),
        }
        if kind not in known:
            self._refuse("rope_type", kind, f"{', '.join(known)} can be expressed")
        values = {
            "kind": kind,
            "factor": keys.pop("factor", None),
            "original_max_position": (
                keys.pop("original_max_position_embeddings", None) or positions
            ),
        }
        values |= {name: keys.pop(name) for name in known[kind] if keys.get(name) is not None}
        if kind == "llama3" and len(values) < 5:
            self._missing("rope_scaling.low_freq_factor")
        if kind == "yarn":
            keys = {k: v for k, v in keys.items() if not (k == "truncate" and v is True)}
            expected = 0.1 * math.log(values["factor"] or 1.0) + 1.0
            if (attention := keys.pop("attention_factor", None)) is not None and not math.isclose(
                attention, expected, rel_tol=1e-6
            ):
                self._refuse(
                    "rope_scaling.attention_factor",
                    attention,
                    f"only 0.1 ln(factor) + 1 = {expected:.6f} can be expressed",
                )
        self._require_empty(keys)
        try:
            return RopeScaling.model_validate(values).model_dump(mode="json")
        except ValidationError as error:
            self._refuse("rope_scaling", values, error.errors()[0]["msg"])

    def _require_empty(self, keys: dict[str, Any]) -> None:
        for key, value in keys.items():
            if value is not None:
                self._refuse(f"rope_scaling.{key}", value, "nextpt does not know it")
