"""Mapping between the parameters of a decoder and the tensors of a Hugging Face folder."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nextpt.exchange.architectures import GRANITE_SWA, Architecture
from nextpt.model import ModelSpec

# Constants by transform. A sink's part of the softmax is exp(sink - max): 0 in every precision; a
# power of two is exact in all of them.
CONSTANTS = {"zeros": 0.0, "ones": 1.0, "no_sinks": -(2.0**14)}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a Hugging Face folder.

    Attributes:
        hf_name: Its name in the folder.
        parameter: The parameter that it stores; None for a constant.
        transform: "same"; "centered": w - 1; "scaled": divided by sqrt(width); or a key of
            `CONSTANTS`.
        shape: Of the tensor and of the parameter.
        factor: The parameter is multiplied by it before the transform: a multiplier of the model
            that the architecture has no key for.
    """

    hf_name: str
    parameter: str | None
    transform: str
    shape: tuple[int, ...]
    factor: float = 1.0

    @property
    def is_exact(self) -> bool:
        """Whether every value can be computed back bit by bit: powers of two round nothing."""
        return self.transform in {"same", *CONSTANTS} and math.frexp(self.factor)[0] == 0.5

    def to_hf(self, parameter: Tensor | None, width: int) -> Tensor:
        """The tensor to store, fp32, from the parameter, fp32, or None for a constant."""
        if parameter is None:
            return torch.full(self.shape, CONSTANTS[self.transform])
        parameter = parameter * self.factor
        if self.transform == "centered":
            return parameter - 1.0
        return parameter / math.sqrt(width) if self.transform == "scaled" else parameter

    def from_hf(self, tensor: Tensor, width: int) -> Tensor:
        """The parameter, fp32, or any part of it; rounded unless `is_exact`."""
        if self.transform == "centered":
            return (tensor + 1.0) / self.factor
        scaled = tensor * math.sqrt(width) if self.transform == "scaled" else tensor
        return scaled / self.factor


def stored_tensors(spec: ModelSpec, architecture: Architecture) -> list[StoredTensor]:
    """All tensors of a Hugging Face folder, in the order of the forward pass."""
    norm = "centered" if architecture.centered else "same"
    matrix = (spec.vocab_size, spec.width)
    tensors = [
        StoredTensor(
            "model.embed_tokens.weight",
            "embed_tokens.weight",
            "scaled" if architecture.centered else "same",
            matrix,
        )
    ]
    for i in range(spec.depth):
        tensors += _block(spec, architecture, f"blocks.{i}", f"model.layers.{i}", norm)
    tensors.append(StoredTensor("model.norm.weight", "final_norm.weight", norm, (spec.width,)))
    if not spec.tied_embeddings:
        tensors.append(StoredTensor("lm_head.weight", "lm_head.weight", "same", matrix))
    elif architecture.centered:  # a tied output matrix would be scaled like the embedding
        tensors.append(StoredTensor("lm_head.weight", "embed_tokens.weight", "same", matrix))
    return [replace(t, factor=_factor(spec, architecture, t)) for t in tensors]


def _factor(spec: ModelSpec, architecture: Architecture, tensor: StoredTensor) -> float:
    """Multiplier of the model that a tensor takes up, for lack of a key of the architecture."""
    layer = (tensor.parameter or "").rpartition(".")[0].rpartition(".")[2]
    if layer == "q_proj":
        return spec.rules.attention_multiplier
    if architecture is GRANITE_SWA:
        return 1.0
    if layer in ("o_proj", "down_proj"):
        return spec.effective_residual_multiplier
    has_own_output = not spec.tied_embeddings or architecture.centered
    if tensor.hf_name == ("lm_head.weight" if has_own_output else "model.norm.weight"):
        return 1 / spec.effective_logits_scaling
    return 1.0


def _block(
    spec: ModelSpec, architecture: Architecture, ours: str, theirs: str, norm: str
) -> list[StoredTensor]:
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    first, second = architecture.norms
    tensors = [
        StoredTensor(
            f"{theirs}.{first}.weight", f"{ours}.attention_norm.weight", norm, (spec.width,)
        )
    ]
    projections = {
        "q_proj": (queries, spec.width),
        "k_proj": (keys, spec.width),
        "v_proj": (keys, spec.width),
        "o_proj": (spec.width, queries),
    }
    for name, shape in projections.items():
        tensors += _linear(
            f"{theirs}.self_attn.{name}", f"{ours}.attention.{name}", shape, spec.bias
        )
    if spec.qk_norm:
        tensors += [
            StoredTensor(
                f"{theirs}.self_attn.{name}.weight",
                f"{ours}.attention.{name}.weight",
                "same",
                (spec.head_dim,),
            )
            for name in ("q_norm", "k_norm")
        ]
    if architecture.sinks:
        parameter = f"{ours}.attention.sinks" if spec.attention_sinks else None
        transform = "same" if spec.attention_sinks else "no_sinks"
        tensors.append(
            StoredTensor(f"{theirs}.self_attn.sinks", parameter, transform, (spec.heads,))
        )
    tensors.append(
        StoredTensor(f"{theirs}.{second}.weight", f"{ours}.ffn_norm.weight", norm, (spec.width,))
    )
    up, down = (spec.ffn_width, spec.width), (spec.width, spec.ffn_width)
    if spec.ffn == "swiglu":
        for name, shape in (("gate_proj", up), ("up_proj", up), ("down_proj", down)):
            tensors += _linear(f"{theirs}.mlp.{name}", f"{ours}.ffn.{name}", shape, spec.bias)
        return tensors
    if not architecture.gated:
        for name, shape in (("up_proj", up), ("down_proj", down)):
            tensors += _linear(f"{theirs}.mlp.{name}", f"{ours}.ffn.{name}", shape, spec.bias)
        return tensors
    # f(x A) * (x 0 + 1): the gate computes everything, and what it gates is one.
    for name, own_name, shape in (("gate_proj", "up_proj", up), ("down_proj", "down_proj", down)):
        tensors += _linear(f"{theirs}.mlp.{name}", f"{ours}.ffn.{own_name}", shape, spec.bias)
        if not spec.bias:
            tensors.append(StoredTensor(f"{theirs}.mlp.{name}.bias", None, "zeros", shape[:1]))
    return [
        *tensors,
        StoredTensor(f"{theirs}.mlp.up_proj.weight", None, "zeros", up),
        StoredTensor(f"{theirs}.mlp.up_proj.bias", None, "ones", up[:1]),
    ]


def _linear(theirs: str, ours: str, shape: tuple[int, int], bias: bool) -> list[StoredTensor]:
    tensors = [StoredTensor(f"{theirs}.weight", f"{ours}.weight", "same", shape)]
    return tensors + (
        [StoredTensor(f"{theirs}.bias", f"{ours}.bias", "same", shape[:1])] if bias else []
    )
