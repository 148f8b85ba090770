"""ModelSpec: the resolved, immutable shape of a decoder; ComputeOptions: how it is computed."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch

from nextpt.config import (
    AttentionGate,
    Config,
    FeedForwardKind,
    LayerKind,
    LossGradient,
    ModelSection,
    ParametrizationKind,
    ResidualInit,
    RopeScaling,
)
from nextpt.model.parametrization import Parametrization

# Options that a spec's JSON omits at these values. Earlier versions did not have them, and files
# compressed then are identified by a hash of this JSON (nextpt/evaluate/coding/container.py).
OMITTED: dict[str, Any] = {
    "layer_pattern": None,
    "local_rope_base": None,
    "attention_sinks": False,
    "attention_gate": "none",
    "value_residual": False,
    "residual_init": "scaled",
    "parametrization": "standard",
    "base_width": None,
    "base_depth": None,
    "base_head_dim": None,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "mtp_depth": 0,
}


def repeat_pattern(pattern: tuple[LayerKind, ...], depth: int) -> tuple[LayerKind, ...]:
    """Kind of each of `depth` layers; the pattern repeats from the last layer backwards."""
    return (pattern * math.ceil(depth / len(pattern)))[-depth:]


def default_ffn_width(ffn: FeedForwardKind, width: int) -> int:
    """Feed-forward width of 8/3 (gated) or 4 (plain) x width, rounded up to a multiple of 64."""
    multiple = 8 / 3 if ffn == "swiglu" else 4
    return 64 * math.ceil(multiple * width / 64)


def _base_shape(section: ModelSection) -> dict[str, int | None]:
    """The keys of the base shape, None where they have no effect."""
    kind = section.parametrization
    has_scale = kind != "standard" and section.base_head_dim != section.resolved_head_dim
    return {
        "base_width": None if kind == "standard" else section.base_width,
        "base_depth": section.base_depth if kind == "completep" else None,
        "base_head_dim": section.base_head_dim if has_scale else None,
    }


@dataclass(frozen=True)
class ModelSpec:
    """Shape and mathematics of a pre-norm decoder, with every default resolved.

    Two decoders with equal specs have parameters of the same names and shapes, and equal weights
    give equal logits. A spec is made from a config's model section, which checks the values.

    Attributes:
        vocab_size: Tokens of the vocabulary, V.
        depth: Number of blocks.
        width: Width of the residual stream, D.
        heads: Query heads, H.
        kv_heads: Key/value heads, K; divides `heads`.
        head_dim: Width of one head, E; even.
        ffn: Feed-forward: gated ("swiglu", arXiv 2002.05202) or plain ("gelu"; "relu2", relu(x)^2,
            arXiv 2109.08668).
        ffn_width: Hidden width of the feed-forward, F.
        max_position: Positions that the rotary tables cover, tokens.
        layer_pattern: Kind of every layer: "local" (it has the window) or "global".
        local_rope_base: Base of the rotary frequencies of local layers.
        rope_base: Base of the rotary frequencies of global layers (arXiv 2104.09864).
        rope_scaling: Stretching of the rotary frequencies; None: not stretched.
        qk_norm: RMSNorm on queries and keys (arXiv 2302.05442).
        tied_embeddings: The output matrix is the embedding matrix.
        bias: Biases in all linear layers.
        norm_eps: Epsilon of every RMSNorm.
        init_std: Standard deviation of the initial matrices.
        logit_softcap: c of c tanh(logits / c) (arXiv 2408.00118); None: not capped.
        sliding_window: Keys that a query of a local layer attends to, itself included; None: all
            layers are global.
        attention_sinks: A learned logit per head takes part in the softmax of attention and carries
            no value (arXiv 2508.10925).
        attention_gate: Sigmoid gate on the output of attention: one per "head" or per "element"
            (arXiv 2505.06708), or "none".
        value_residual: The values of every layer after the first are mixed with those of the first
            (arXiv 2410.17897).
        residual_init: Initial matrices whose output is added to the residual stream: "scaled" with
            the depth (`Init`), or "zero".
        parametrization: How initial values, multipliers and the optimizer's options follow from
            those of the base shape (`rules`).
        base_width: Width of the base shape; None where it has no effect.
        base_depth: Depth of the base shape; None where it has no effect.
        base_head_dim: Head width of the base shape; None where it has no effect.
        residual_multiplier: Factor on what attention and feed-forward add to the residual stream,
            beside that of `rules`.
        logits_scaling: Divisor of the output logits, before the cap, beside that of `rules`.
        mtp_depth: Modules of multi-token prediction, which only training has (`inference`).
    """

    vocab_size: int
    depth: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: FeedForwardKind
    ffn_width: int
    max_position: int
    layer_pattern: tuple[LayerKind, ...]
    local_rope_base: float
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False
    tied_embeddings: bool = False
    bias: bool = False
    norm_eps: float = 1e-5
    init_std: float = 0.02
    logit_softcap: float | None = None
    sliding_window: int | None = None
    attention_sinks: bool = False
    attention_gate: AttentionGate = "none"
    value_residual: bool = False
    residual_init: ResidualInit = "scaled"
    parametrization: ParametrizationKind = "standard"
    base_width: int | None = None
    base_depth: int | None = None
    base_head_dim: int | None = None
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    mtp_depth: int = 0

    @classmethod
    def from_section(cls, section: ModelSection, max_position: int) -> ModelSpec:
        """Resolve a model section; `max_position` takes effect where the section gives none."""
        uniform: tuple[LayerKind, ...] = ("local" if section.sliding_window else "global",)
        resolved: dict[str, Any] = {
            "kv_heads": section.kv_heads or section.heads,
            "head_dim": section.resolved_head_dim,
            "ffn_width": section.ffn_width or default_ffn_width(section.ffn, section.width),
            "max_position": section.max_position or max_position,
            "layer_pattern": repeat_pattern(section.layer_pattern or uniform, section.depth),
            "local_rope_base": section.local_rope_base or section.rope_base,
            **_base_shape(section),
        }
        names = [field.name for field in fields(cls)]
        return cls(**{name: resolved.get(name, getattr(section, name)) for name in names})

    @classmethod
    def from_config(cls, config: Config) -> ModelSpec:
        """Resolve the model section of a run config."""
        return cls.from_section(config.model, config.max_position)

    def to_json(self) -> dict[str, Any]:
        """Return the fields for JSON, less `OMITTED`: valid values of a config's model section."""
        scaling = self.rope_scaling.model_dump(mode="json") if self.rope_scaling else None
        same_base = self.local_rope_base == self.rope_base
        values = {field.name: getattr(self, field.name) for field in fields(self)} | {
            "rope_scaling": scaling,
            "layer_pattern": self._shortest_pattern(),
            "local_rope_base": None if same_base else self.local_rope_base,
        }
        return {k: v for k, v in values.items() if k not in OMITTED or v != OMITTED[k]}

    @property
    def inference(self) -> ModelSpec:
        """The model that evaluation, generation and exports have: without `mtp_depth`."""
        return replace(self, mtp_depth=0)

    def _shortest_pattern(self) -> list[LayerKind] | None:
        """Shortest pattern that gives these layers; None where the window alone says it."""
        layers = self.layer_pattern
        if len(set(layers)) == 1:
            return None
        lengths = range(1, len(layers) + 1)
        return next(
            [*layers[-length:]]
            for length in lengths
            if repeat_pattern(layers[-length:], len(layers)) == layers
        )

    @cached_property
    def rules(self) -> Parametrization:
        """What follows from the parametrization for this shape."""
        return Parametrization(
            self.parametrization,
            self.width / (self.base_width or self.width),
            self.depth / (self.base_depth or self.depth),
            self.depth,
            self.head_dim,
            self.base_head_dim or self.head_dim,
            self.heads,
        )

    @property
    def effective_residual_multiplier(self) -> float:
        """Factor on what attention and feed-forward add to the residual stream."""
        return self.residual_multiplier * self.rules.residual_multiplier

    @property
    def effective_logits_scaling(self) -> float:
        """Divisor of the output logits, before the cap."""
        return self.logits_scaling * self.rules.logits_scaling

    @property
    def attention_gates(self) -> int:
        """Gates of one attention layer."""
        return {"none": 0, "head": self.heads, "element": self.heads * self.head_dim}[
            self.attention_gate
        ]

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Keys that a query attends to, by layer; None: all before it."""
        return tuple(
            self.sliding_window if kind == "local" else None for kind in self.layer_pattern
        )

    @property
    def rope_bases(self) -> tuple[float, ...]:
        """Base of the rotary frequencies, by layer."""
        return tuple(
            self.local_rope_base if kind == "local" else self.rope_base
            for kind in self.layer_pattern
        )

    @property
    def has_mixed_windows(self) -> bool:
        """Whether some layers, and not all, have a window that hides any token."""
        return self.effective_window is not None and len(set(self.layer_pattern)) > 1

    @property
    def effective_window(self) -> int | None:
        """`sliding_window` where it hides any token, else None."""
        window = self.sliding_window
        return window if window is not None and window < self.max_position else None


@dataclass(frozen=True)
class ComputeOptions:
    """Implementations and memory of a decoder's computation; they change no parameter.

    Attributes:
        attention: Attention implementation by name, or "auto" (kernels/attention).
        cross_entropy: Loss implementation by name, or "auto" (kernels/cross_entropy).
        activation_checkpointing: Recompute each block in the backward pass.
        loss_gradient: Summation of the output matrix's gradient over chunks: "precise" or "small".
        loss_logits_dtype: dtype of the loss's logits; None: that of the hidden states.
        loss_workspace_bytes: Memory of the loss beside its gradients; None: the kernel's default.
        dropout: Share of the embedding, and of what each layer adds to the residual stream, that is
            dropped in training.
    """

    attention: str = "auto"
    cross_entropy: str = "auto"
    activation_checkpointing: bool = False
    loss_gradient: LossGradient = "precise"
    loss_logits_dtype: torch.dtype | None = None
    loss_workspace_bytes: int | None = None
    dropout: float = 0.0

    @classmethod
    def from_config(cls, config: Config) -> ComputeOptions:
        """Read the options from the model and train sections of a run config."""
        model, train = config.model, config.train
        return cls(
            attention=model.attention,
            cross_entropy=model.cross_entropy,
            activation_checkpointing=train.activation_checkpointing,
            loss_gradient=train.loss_gradient,
            loss_logits_dtype=torch.float32 if train.loss_logits_fp32 else None,
            loss_workspace_bytes=(
                train.loss_workspace_mib * 2**20 if train.loss_workspace_mib else None
            ),
            dropout=model.dropout,
        )
