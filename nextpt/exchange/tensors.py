"""How the parameters of a decoder are named and stored in a Hugging Face folder, both ways."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nextpt.config import ModelSection
from nextpt.exchange.architectures import Architecture


@dataclass(frozen=True)
class Stored:
    """One tensor of the folder.

    theirs: its name there. ours: the parameter it is made from, None for a constant. how: "same";
    "centered", w - 1; "scaled", divided by sqrt(width); or "zeros", "ones". shape: of both.
    """

    theirs: str
    ours: str | None
    how: str
    shape: tuple[int, ...]

    def make(self, parameter: Tensor | None, width: int) -> Tensor:
        """The tensor to store, fp32. parameter: fp32, None for a constant."""
        if parameter is None:
            return torch.full(self.shape, 1.0 if self.how == "ones" else 0.0)
        if self.how == "centered":
            return parameter - 1.0
        return parameter / math.sqrt(width) if self.how == "scaled" else parameter

    def unmake(self, tensor: Tensor, width: int) -> Tensor:
        """The parameter, fp32, or any part of it. Exact for "same", else to the last bit or two."""
        if self.how == "centered":
            return tensor + 1.0
        return tensor * math.sqrt(width) if self.how == "scaled" else tensor


def stored_tensors(c: ModelSection, architecture: Architecture) -> list[Stored]:
    """Every tensor of the folder, in the order of the forward pass."""
    norm = "centered" if architecture.centered else "same"
    matrix = (c.vocab_size, c.width)
    found = [
        Stored(
            "model.embed_tokens.weight",
            "embed_tokens.weight",
            "scaled" if architecture.centered else "same",
            matrix,
        )
    ]
    for i in range(c.depth):
        found += _block(c, architecture, f"blocks.{i}", f"model.layers.{i}", norm)
    found.append(Stored("model.norm.weight", "final_norm.weight", norm, (c.width,)))
    if not c.tied_embeddings:
        found.append(Stored("lm_head.weight", "lm_head.weight", "same", matrix))
    elif architecture.centered:  # there, a tied output matrix would be scaled too
        found.append(Stored("lm_head.weight", "embed_tokens.weight", "same", matrix))
    return found


def _block(
    c: ModelSection, architecture: Architecture, ours: str, theirs: str, norm: str
) -> list[Stored]:
    queries, keys = c.heads * c.head_dim_, c.kv_heads_ * c.head_dim_
    first, second = architecture.norms
    found = [Stored(f"{theirs}.{first}.weight", f"{ours}.attention_norm.weight", norm, (c.width,))]
    projections = {
        "q_proj": (queries, c.width),
        "k_proj": (keys, c.width),
        "v_proj": (keys, c.width),
        "o_proj": (c.width, queries),
    }
    for name, shape in projections.items():
        found += _linear(f"{theirs}.self_attn.{name}", f"{ours}.attention.{name}", shape, c.bias)
    if c.qk_norm:
        found += [
            Stored(
                f"{theirs}.self_attn.{name}.weight",
                f"{ours}.attention.{name}.weight",
                "same",
                (c.head_dim_,),
            )
            for name in ("q_norm", "k_norm")
        ]
    found.append(Stored(f"{theirs}.{second}.weight", f"{ours}.ffn_norm.weight", norm, (c.width,)))
    up, down = (c.ffn_width_, c.width), (c.width, c.ffn_width_)
    if c.ffn == "swiglu":
        for name, shape in (("gate_proj", up), ("up_proj", up), ("down_proj", down)):
            found += _linear(f"{theirs}.mlp.{name}", f"{ours}.ffn.{name}", shape, c.bias)
        return found
    if not architecture.gated:
        for name, shape in (("up_proj", up), ("down_proj", down)):
            found += _linear(f"{theirs}.mlp.{name}", f"{ours}.ffn.{name}", shape, c.bias)
        return found
    # gelu(x A) * (x 0 + 1): the gate does the work and what it gates is one.
    for name, own, shape in (("gate_proj", "up_proj", up), ("down_proj", "down_proj", down)):
        found += _linear(f"{theirs}.mlp.{name}", f"{ours}.ffn.{own}", shape, c.bias)
        if not c.bias:
            found.append(Stored(f"{theirs}.mlp.{name}.bias", None, "zeros", shape[:1]))
    return [
        *found,
        Stored(f"{theirs}.mlp.up_proj.weight", None, "zeros", up),
        Stored(f"{theirs}.mlp.up_proj.bias", None, "ones", up[:1]),
    ]


def _linear(theirs: str, ours: str, shape: tuple[int, int], bias: bool) -> list[Stored]:
    found = [Stored(f"{theirs}.weight", f"{ours}.weight", "same", shape)]
    return found + ([Stored(f"{theirs}.bias", f"{ours}.bias", "same", shape[:1])] if bias else [])
