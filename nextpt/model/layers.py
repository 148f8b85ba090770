"""Layers of the decoder: RMSNorm, rotary grouped-query attention, feed-forward, key-value cache.

Shapes: B rows, T tokens, D residual width, H query heads, K key/value heads, E head width, F
feed-forward width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.attention import Packing, attention
from nextpt.model.dropout import dropout, place_keys
from nextpt.model.init import Init
from nextpt.model.rope import rotate
from nextpt.model.spec import ComputeOptions, ModelSpec


@dataclass
class KVCache:
    """Keys and values of the tokens so far.

    Attributes:
        keys: One tensor per block: [B, capacity, K, E] where the whole text is kept, else
            [B, <= window - 1, K, E].
        values: The same for the values.
        windows: Window of each block that keeps only what later tokens see; None for a block that
            keeps the whole text.
        length: Tokens of the text so far.
    """

    keys: list[Tensor]
    values: list[Tensor]
    windows: tuple[int | None, ...]
    length: int = 0

    @classmethod
    def empty(
        cls, spec: ModelSpec, rows: int, capacity: int, *, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """Allocate a cache for `rows` rows of up to `capacity` tokens.

        Local layers keep their window where there are global layers too. Where all are local they
        keep the whole text: files that were compressed with such a model depend on the order in
        which its sums are made (nextpt/evaluate/coding).
        """
        windows = spec.windows if spec.has_mixed_windows else (None,) * spec.depth
        keys, values = (
            [
                torch.zeros(
                    (rows, capacity if window is None else 0, spec.kv_heads, spec.head_dim),
                    dtype=dtype,
                    device=device,
                )
                for window in windows
            ]
            for _ in range(2)
        )
        return cls(keys, values, windows)

    def append(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Store the new tokens of one block.

        Returns:
            The block's keys and values that the new tokens may see, and the first one's position.
        """
        stop, window = self.length + k.shape[1], self.windows[block]
        if window is None:
            self.keys[block][:, self.length : stop] = k
            self.values[block][:, self.length : stop] = v
            return self.keys[block][:, :stop], self.values[block][:, :stop], 0
        k, v = torch.cat((self.keys[block], k), 1), torch.cat((self.values[block], v), 1)
        start = max(k.shape[1] - (window - 1), 0)
        # Copies: a slice would keep the whole prompt in memory
        self.keys[block], self.values[block] = k[:, start:].clone(), v[:, start:].clone()
        return k, v, stop - k.shape[1]

    def take(self, rows: Tensor) -> KVCache:
        """Copy some rows, int64 [n], into a new cache; a row may be taken several times."""
        keys, values = ([t[rows] for t in tensors] for tensors in (self.keys, self.values))
        return KVCache(keys, values, self.windows, self.length)


class Linear(nn.Module):
    """x W^T (+ b), with the matrix drawn by `init` under its own name.

    Args:
        inputs: Input width.
        outputs: Output width.
        bias: Adds a bias, initially zero.
        init: Draws the initial matrix.
        name: The matrix's name in `init`.
        residual: The output is added to the residual stream, which `init` scales down.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool,
        init: Init,
        name: str,
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        init.normal_(self.weight, name, residual=residual)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to the last axis of x."""
        return F.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (arXiv 1910.07467) of the last axis; statistics in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x; its dtype is kept."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Embedding(nn.Module):
    """Token embedding matrix [V, D]."""

    def __init__(self, vocabulary: int, width: int, init: Init, name: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width))
        init.normal_(self.weight, name, role="embedding")

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Look up int64 [B, T]; returns [B, T, D]."""
        return F.embedding(tokens_BT, self.weight)


class Attention(nn.Module):
    """Causal grouped-query attention (arXiv 2305.13245) with rotary positions.

    Args:
        spec: Shape of the model.
        init: Draws the initial matrices.
        name: Prefix of the parameters' names in `init`.
        index: Number of the block, for the cache.
        implementation: Attention implementation by name, or "auto".
    """

    def __init__(
        self, spec: ModelSpec, init: Init, name: str, index: int, implementation: str
    ) -> None:
        super().__init__()
        self.spec = spec
        self.index = index
        self.window = spec.windows[index]
        self.implementation = implementation
        queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim

        def linear(part: str, inputs: int, outputs: int, residual: bool = False) -> Linear:
            return Linear(
                inputs, outputs, bias=spec.bias, init=init, name=f"{name}.{part}", residual=residual
            )

        self.q_proj = linear("q_proj", spec.width, queries)
        self.k_proj = linear("k_proj", spec.width, keys)
        self.v_proj = linear("v_proj", spec.width, keys)
        self.o_proj = linear("o_proj", queries, spec.width, residual=True)
        self.q_norm = RMSNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None
        mixed = spec.value_residual and index > 0
        self.value_share = nn.Parameter(torch.full((1,), 0.5)) if mixed else None
        gates = spec.attention_gates
        self.gate_proj = linear("gate_proj", spec.width, gates) if gates else None
        self.sinks = nn.Parameter(torch.zeros(spec.heads)) if spec.attention_sinks else None

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        documents: Packing | None,
        cache: KVCache | None,
        first_values: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the attention's contribution to the residual stream.

        Args:
            x_BTD: Normalised residual stream.
            rope: (cos, sin) of each token's position, [B, T, 1, E / 2].
            documents: Which tokens may attend to each other; all of a row if None.
            cache: Keys and values of earlier tokens, to which these are appended.
            first_values: Values of these tokens in the first layer, where they are mixed with them.

        Returns:
            The contribution [B, T, D], and the values of these tokens [B, T, K, E].
        """
        spec, (rows, length, _) = self.spec, x_BTD.shape
        q = self.q_proj(x_BTD).view(rows, length, spec.heads, spec.head_dim)
        k = self.k_proj(x_BTD).view(rows, length, spec.kv_heads, spec.head_dim)
        v = self.v_proj(x_BTD).view(rows, length, spec.kv_heads, spec.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if self.value_share is not None and first_values is not None:
            v = torch.lerp(v, first_values, self.value_share)
        values, key_offset = v, 0
        if cache is not None:
            k, v, key_offset = cache.append(self.index, k, v)
        out = attention(
            q,
            k,
            v,
            key_offset=key_offset,
            documents=documents,
            window=self.window,
            scale=spec.rules.attention_scale,
            sinks=self.sinks,
            implementation=self.implementation,
        )
        if self.gate_proj is not None:
            gate_BTG = torch.sigmoid(self.gate_proj(x_BTD))
            out = out * gate_BTG.view(rows, length, spec.heads, -1)
        return self.o_proj(out.reshape(rows, length, -1)), values


class FeedForward(nn.Module):
    """Feed-forward layer: SwiGLU (arXiv 2002.05202), or GELU or relu(x)^2 without a gate."""

    def __init__(self, spec: ModelSpec, init: Init, name: str) -> None:
        super().__init__()
        self.kind = spec.ffn

        def linear(part: str, inputs: int, outputs: int, residual: bool = False) -> Linear:
            return Linear(
                inputs, outputs, bias=spec.bias, init=init, name=f"{name}.{part}", residual=residual
            )

        gated = spec.ffn == "swiglu"
        self.gate_proj = linear("gate_proj", spec.width, spec.ffn_width) if gated else None
        self.up_proj = linear("up_proj", spec.width, spec.ffn_width)
        self.down_proj = linear("down_proj", spec.ffn_width, spec.width, residual=True)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the layer's contribution to the residual stream, [B, T, D]."""
        up_BTF = self.up_proj(x_BTD)
        if self.gate_proj is not None:
            hidden_BTF = F.silu(self.gate_proj(x_BTD)) * up_BTF
        else:
            hidden_BTF = F.gelu(up_BTF) if self.kind == "gelu" else F.relu(up_BTF).square()
        output_BTD: Tensor = self.down_proj(hidden_BTF)
        return output_BTD


class Block(nn.Module):
    """Pre-norm block: x + m attention(norm(x)), then x + m feed-forward(norm(x)), m a constant.

    Args:
        spec: Shape of the model.
        init: Draws the initial matrices.
        name: Prefix of the parameters' names in `init`.
        index: Number of the block, for the cache.
        options: Attention implementation, and share of both terms that is dropped in training.
    """

    def __init__(
        self, spec: ModelSpec, init: Init, name: str, index: int, options: ComputeOptions
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(spec.width, spec.norm_eps)
        self.attention = Attention(spec, init, f"{name}.attention", index, options.attention)
        self.ffn_norm = RMSNorm(spec.width, spec.norm_eps)
        self.ffn = FeedForward(spec, init, f"{name}.ffn")
        self.multiplier = spec.effective_residual_multiplier
        self.dropout = options.dropout

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        documents: Packing | None,
        cache: KVCache | None = None,
        first_values: Tensor | None = None,
        dropout_keys: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the residual stream after the block, [B, T, D].

        The first arguments and the second result, the values of attention, are those of
        `Attention`. `dropout_keys`, int32 [B, T], determine what is dropped; None drops nothing.
        """
        normed_BTD = self.attention_norm(x_BTD)
        attended_BTD, values = self.attention(normed_BTD, rope, documents, cache, first_values)
        if dropout_keys is not None:
            attended_BTD = dropout(attended_BTD, dropout_keys, self.dropout)
        x_BTD = x_BTD.add(attended_BTD, alpha=self.multiplier)
        added_BTD = self.ffn(self.ffn_norm(x_BTD))
        if dropout_keys is not None:
            added_BTD = dropout(added_BTD, place_keys(dropout_keys, 1), self.dropout)
        return x_BTD.add(added_BTD, alpha=self.multiplier), values
