"""What a config.json of the transformers library describes, as a model section.

Nothing is imported or run for it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from nextpt.base.errors import CheckpointError
from nextpt.config import ModelSection, RopeScaling
from nextpt.exchange.architectures import (
    APERTUS,
    ARCHITECTURES,
    HINT,
    HUNYUAN3,
    MISTRAL,
    QWEN3,
    SMOLLM3,
    VAULTGEMMA,
    Architecture,
    hf_config,
)

# Keys that change nothing of what the model computes.
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
# Keys of the parts that are not in every architecture but do not matter where all layers are alike
# and dense.
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

LARGEST = {"num_hidden_layers": 10_000}


def read_config(folder: Path) -> tuple[Architecture, ModelSection, int]:
    """(architecture, model section, positions) of a Hugging Face folder.

    Raises CheckpointError that names the first key that a decoder of ours cannot express.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kind = values["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is no config of a Hugging Face model: {error}; give a folder with config.json"
            " and *.safetensors"
        ) from None
    architecture = ARCHITECTURES.get(kind) if isinstance(kind, str) else None
    if architecture is None:
        raise CheckpointError(
            f"{path}: model_type = {kind!r} cannot be imported; these can:"
            f" {', '.join(sorted(ARCHITECTURES))}"
        )
    try:
        found = Keys(path, values, architecture).section()
        return architecture, *_as_exported(values, architecture, found, path)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{path} has a value of a kind that no model of {architecture.name} has: {error}"
        ) from None


def _as_exported(
    values: dict[str, Any], architecture: Architecture, found: dict[str, Any], path: Path
) -> tuple[ModelSection, int]:
    """The section that the export was made from, as long as the other keys still say the same.

    Else the one they describe.
    """
    hint = values.get(HINT)
    try:
        if hint is not None:
            section, positions = ModelSection.model_validate(hint), hint["max_position"]
            if (
                section.depth == found["depth"]
                and _says(section, positions, architecture, path) == found
            ):
                return section, positions
    except (ValueError, CheckpointError, TypeError, KeyError):
        pass  # somebody changed it: the keys that transformers reads are what counts
    return _own_section(found, architecture, path), found["max_position"]


def _says(
    section: ModelSection, positions: int, architecture: Architecture, path: Path
) -> dict[str, Any] | None:
    """What is found in the config.json that this section is exported to.

    None when it is of another architecture.
    """
    again = hf_config(section, positions, start_id=0, end_id=0, dtype="float32")
    return (
        Keys(path, again, architecture).section()
        if again["model_type"] == architecture.model_type
        else None
    )


def _own_section(found: dict[str, Any], architecture: Architecture, path: Path) -> ModelSection:
    activation, wanted = found.pop("activation"), "silu" if architecture.gated else "gelu"
    if activation != wanted:
        _refuse(
            path,
            architecture.activation[0],
            activation,
            f"only {wanted} of this architecture can be expressed",
        )
    biases = found.pop("attention_bias"), found.pop("mlp_bias")
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
            found | {"bias": biases[0], "ffn": "swiglu" if architecture.gated else "gelu"}
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part} = {first['input']!r}: " for part in first["loc"][:1])
        raise CheckpointError(
            f"{path} cannot be expressed: {where}{first['msg'].removeprefix('Value error, ')}"
        ) from None


def _refuse(path: Path, key: str, value: Any, why: str) -> NoReturn:
    raise CheckpointError(f"{path}: {key} = {value!r} cannot be imported: {why}")


class Keys:
    """Reads the keys of one config.json once each, so that what is left over is known not to be understood."""

    def __init__(self, path: Path, values: dict[str, Any], architecture: Architecture) -> None:
        self.path, self.architecture = path, architecture
        self._left = {
            k: v
            for k, v in values.items()
            if k not in NEUTRAL | UNUSED.get(architecture.model_type, set())
        }

    def section(self) -> dict[str, Any]:
        """Values of a model section, and beside them activation, attention_bias and mlp_bias as they are there."""
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
        found = {
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
            "sliding_window": self._window(depth),
        }
        if a is HUNYUAN3:
            self._all("mlp_layer_types", "dense", depth)
        if a is VAULTGEMMA:
            found["logit_softcap"] = self._take("final_logit_softcapping", 30.0)
            self._must_be("attn_logit_softcapping", None, 50.0)
            self._must_be("query_pre_attn_scalar", head_dim, 256)
        for key, value in self._left.items():
            if value not in (None, False, [], {}):
                self._refuse(key, value, "nextpt does not know it")
        return found

    def _take(self, key: str, default: Any) -> Any:
        return self._left.pop(key, default)

    def _number(self, key: str) -> Any:
        if key not in self._left:
            self._missing(key)
        value = self._left.pop(key)
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
        if value != int(value) or value > LARGEST.get(key, 2**31):
            self._refuse(
                key, value, f"a whole number up to {LARGEST.get(key, 2**31):,} is expected"
            )
        return int(value)

    def _missing(self, key: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: key {key} is missing")

    def _refuse(self, key: str, value: Any, why: str) -> NoReturn:
        _refuse(self.path, key, value, why)

    def _must_be(self, key: str, wanted: Any, default: Any) -> None:
        if (value := self._take(key, default)) != wanted:
            self._refuse(key, value, f"only {wanted} can be expressed")

    def _all(self, key: str, wanted: Any, depth: int) -> None:
        value = self._take(key, None)
        if value != [wanted] * depth:
            self._refuse(key, value, f"only {wanted!r} for every layer can be expressed")

    def _window(self, depth: int) -> int | None:
        """The sliding window of all layers; None where none has one."""
        a = self.architecture
        if not a.window:
            self._must_be("sliding_window", None, None)
            return None
        window, layers = self._take("sliding_window", 4096), self._take("layer_types", None)
        if a is SMOLLM3:
            self._all("no_rope_layers", 1, depth)
        if a in (QWEN3, SMOLLM3) and not self._take("use_sliding_window", False):
            window = None
        first = self._take("max_window_layers", 28) if a is QWEN3 else 0
        if layers is None:
            if a is VAULTGEMMA:
                self._missing("layer_types")
            sliding = a is MISTRAL or (a is QWEN3 and window is not None)
            layers = [
                "sliding_attention" if sliding and window and i >= first else "full_attention"
                for i in range(depth)
            ]
        if layers not in (["sliding_attention"] * depth, ["full_attention"] * depth):
            self._refuse(
                "layer_types", layers, "only the same window in every layer can be expressed"
            )
        return window if layers[0] == "sliding_attention" else None

    def _rope(self, positions: int) -> dict[str, Any]:
        """rope_base and rope_scaling, from the keys of release 5 or those before it."""
        old = self._take("rope_scaling", None)
        keys = dict(old or self._take("rope_parameters", None) or {})
        self._take("rope_parameters", None)
        theta = self._take("rope_theta", self.architecture.theta)
        base = keys.pop("rope_theta", None) or theta
        if base is None or (self.architecture is APERTUS and not keys and old is None):
            self._missing("rope_parameters")
        for holder in (keys, self._left):
            if (partial := holder.pop("partial_rotary_factor", None)) not in (None, 1, 1.0):
                self._refuse("partial_rotary_factor", partial, "only whole heads can be rotated")
        kind = keys.pop("rope_type", None) or keys.pop("type", None) or "default"
        keys.pop("type", None)
        if kind == "default":
            self._nothing_left(keys)
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
            wanted = 0.1 * math.log(values["factor"] or 1.0) + 1.0
            if (attention := keys.pop("attention_factor", None)) is not None and not math.isclose(
                attention, wanted, rel_tol=1e-6
            ):
                self._refuse(
                    "rope_scaling.attention_factor",
                    attention,
                    f"only 0.1 ln(factor) + 1 = {wanted:.6f} can be expressed",
                )
        self._nothing_left(keys)
        try:
            return RopeScaling.model_validate(values).model_dump(mode="json")
        except ValidationError as error:
            self._refuse("rope_scaling", values, error.errors()[0]["msg"])

    def _nothing_left(self, keys: dict[str, Any]) -> None:
        for key, value in keys.items():
            if value is not None:
                self._refuse(f"rope_scaling.{key}", value, "nextpt does not know it")
