"""ModelSpec: the resolved, immutable shape of a decoder; ComputeOptions: how it is computed."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from nextpt.config import Config, ModelSection, RopeScaling


def default_ffn_width(ffn: Literal["swiglu", "gelu"], width: int) -> int:
    """Feed-forward width of 8/3 (swiglu) or 4 (gelu) x width, rounded up to a multiple of 64."""
    multiple = 8 / 3 if ffn == "swiglu" else 4
    return 64 * math.ceil(multiple * width / 64)


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
        ffn: Feed-forward: gated ("swiglu", arXiv 2002.05202) or plain ("gelu").
        ffn_width: Hidden width of the feed-forward, F.
        max_position: Positions that the rotary tables cover, tokens.
        rope_base: Base of the rotary frequencies (arXiv 2104.09864).
        rope_scaling: Stretching of the rotary frequencies; None: not stretched.
        qk_norm: RMSNorm on queries and keys (arXiv 2302.05442).
        tied_embeddings: The output matrix is the embedding matrix.
        bias: Biases in all linear layers.
        norm_eps: Epsilon of every RMSNorm.
        init_std: Standard deviation of the initial matrices.
        logit_softcap: c of c tanh(logits / c) (arXiv 2408.00118); None: not capped.
        sliding_window: Keys that a query attends to, itself included; None: all before it.
    """

    vocab_size: int
    depth: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: Literal["swiglu", "gelu"]
    ffn_width: int
    max_position: int
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False
    tied_embeddings: bool = False
    bias: bool = False
    norm_eps: float = 1e-5
    init_std: float = 0.02
    logit_softcap: float | None = None
    sliding_window: int | None = None

    @classmethod
    def from_section(cls, section: ModelSection, max_position: int) -> ModelSpec:
        """Resolve a model section; `max_position` takes effect where the section gives none."""
        resolved = {
            "kv_heads": section.kv_heads or section.heads,
            "head_dim": section.head_dim or section.width // section.heads,
            "ffn_width": section.ffn_width or default_ffn_width(section.ffn, section.width),
            "max_position": section.max_position or max_position,
        }
        names = [field.name for field in fields(cls)]
        return cls(**{name: resolved.get(name, getattr(section, name)) for name in names})

    @classmethod
    def from_config(cls, config: Config) -> ModelSpec:
        """Resolve the model section of a run config."""
        return cls.from_section(config.model, config.max_position)

    def to_json(self) -> dict[str, Any]:
        """Return the fields for JSON; they are valid values of a config's model section."""
        scaling = self.rope_scaling.model_dump(mode="json") if self.rope_scaling else None
        return {field.name: getattr(self, field.name) for field in fields(self)} | {
            "rope_scaling": scaling
        }

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
    """

    attention: str = "auto"
    cross_entropy: str = "auto"
    activation_checkpointing: bool = False
    loss_gradient: Literal["precise", "small"] = "precise"
    loss_logits_dtype: torch.dtype | None = None
    loss_workspace_bytes: int | None = None

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
        )
