"""A pre-norm decoder: RMSNorm, rotary grouped-query attention, gated feed-forward.

Shapes: B rows, T tokens, D residual width, H query heads, K key/value heads, E head width, F
feed-forward width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kernels.attention import attention
from kernels.attention.documents import Packing
from kernels.cross_entropy import LinearCrossEntropy
from nextpt.config import Config, ModelSection
from nextpt.model.init import Init
from nextpt.model.rope import rotate, tables


@dataclass
class KVCache:
    """Keys and values of the tokens seen so far, one pair [B, capacity, K, E] per block.

    `length` tokens are filled.
    """

    keys: list[Tensor]
    values: list[Tensor]
    length: int = 0

    @classmethod
    def empty(
        cls, config: Config, rows: int, capacity: int, *, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        shape = (rows, capacity, config.model.kv_heads_, config.model.head_dim_)
        blank = [
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.model.depth)]
            for _ in range(2)
        ]
        return cls(*blank)

    def append(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens of one block; returns all its keys and values so far."""
        stop = self.length + k.shape[1]
        self.keys[block][:, self.length : stop] = k
        self.values[block][:, self.length : stop] = v
        return self.keys[block][:, :stop], self.values[block][:, :stop]

    def take(self, rows: Tensor) -> KVCache:
        """A cache of some rows of this one, int64 [n]; a row may be taken several times."""
        return KVCache(*([t[rows] for t in kept] for kept in (self.keys, self.values)), self.length)


class Linear(nn.Module):
    """x W^T (+ b), drawn by `init` under its own name."""

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
        return F.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (arXiv 1910.07467); statistics in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Embedding(nn.Module):
    """Token embedding [V, D]."""

    def __init__(self, vocabulary: int, width: int, init: Init, name: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width))
        init.normal_(self.weight, name)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return F.embedding(tokens_BT, self.weight)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, c: ModelSection, init: Init, name: str, index: int) -> None:
        super().__init__()
        self.c, self.index = c, index
        heads, kv_heads, head_dim = c.heads, c.kv_heads_, c.head_dim_
        self.q_proj = Linear(
            c.width, heads * head_dim, bias=c.bias, init=init, name=f"{name}.q_proj"
        )
        self.k_proj = Linear(
            c.width, kv_heads * head_dim, bias=c.bias, init=init, name=f"{name}.k_proj"
        )
        self.v_proj = Linear(
            c.width, kv_heads * head_dim, bias=c.bias, init=init, name=f"{name}.v_proj"
        )
        self.o_proj = Linear(
            heads * head_dim, c.width, bias=c.bias, init=init, name=f"{name}.o_proj", residual=True
        )
        self.q_norm = RMSNorm(head_dim, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(head_dim, c.norm_eps) if c.qk_norm else None

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        documents: Packing | None,
        cache: KVCache | None,
    ) -> Tensor:
        c, (rows, length, _) = self.c, x_BTD.shape
        q = self.q_proj(x_BTD).view(rows, length, c.heads, c.head_dim_)
        k = self.k_proj(x_BTD).view(rows, length, c.kv_heads_, c.head_dim_)
        v = self.v_proj(x_BTD).view(rows, length, c.kv_heads_, c.head_dim_)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(self.index, k, v)
        out = attention(
            q, k, v, documents=documents, window=c.sliding_window, implementation=c.attention
        )
        return self.o_proj(out.reshape(rows, length, -1))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202) or GELU."""

    def __init__(self, c: ModelSection, init: Init, name: str) -> None:
        super().__init__()
        width = c.ffn_width_
        self.gate_proj = (
            Linear(c.width, width, bias=c.bias, init=init, name=f"{name}.gate_proj")
            if c.ffn == "swiglu"
            else None
        )
        self.up_proj = Linear(c.width, width, bias=c.bias, init=init, name=f"{name}.up_proj")
        self.down_proj = Linear(
            width, c.width, bias=c.bias, init=init, name=f"{name}.down_proj", residual=True
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        up_BTF = self.up_proj(x_BTD)
        hidden_BTF = (
            F.silu(self.gate_proj(x_BTD)) * up_BTF if self.gate_proj is not None else F.gelu(up_BTF)
        )
        return self.down_proj(hidden_BTF)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, c: ModelSection, init: Init, name: str, index: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(c.width, c.norm_eps)
        self.attention = Attention(c, init, f"{name}.attention", index)
        self.ffn_norm = RMSNorm(c.width, c.norm_eps)
        self.ffn = FeedForward(c, init, f"{name}.ffn")

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        documents: Packing | None,
        cache: KVCache | None = None,
    ) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope, documents, cache)
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))


class LMHead(LinearCrossEntropy):
    """The output matrix [V, D], the embedding's own where they are tied."""

    def __init__(self, config: Config, init: Init, embedding: Embedding) -> None:
        c, train = config.model, config.train
        weight = embedding.weight
        if not c.tied_embeddings:
            weight = nn.Parameter(torch.empty(c.vocab_size, c.width))
            init.normal_(weight, "lm_head")
        super().__init__(
            weight,
            softcap=c.logit_softcap,
            implementation=c.cross_entropy,
            gradient=train.loss_gradient,
            logits_dtype=torch.float32 if train.loss_logits_fp32 else None,
            workspace_bytes=train.loss_workspace_mib * 2**20 if train.loss_workspace_mib else None,
        )


class Decoder(nn.Module):
    """The whole model. Parameters are drawn from (config.run.seed, name)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c = config.model
        init = Init(config.run.seed, c.init_std, c.depth)
        self.embed_tokens = Embedding(c.vocab_size, c.width, init, "embed_tokens")
        self.blocks = nn.ModuleList(Block(c, init, f"blocks.{i}", i) for i in range(c.depth))
        self.final_norm = RMSNorm(c.width, c.norm_eps)
        self.lm_head = LMHead(config, init, self.embed_tokens)
        self.activation_checkpointing = config.train.activation_checkpointing
        # Not registered as buffers: they must stay fp32 and on no checkpoint, and are cheap to make
        # again.
        self._rope = tables(config.max_position, c.head_dim_, c.rope_base, c.rope_scaling)

    def forward(
        self,
        tokens_BT: Tensor,
        position_ids_BT: Tensor,
        documents: Packing | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Final hidden states [B, T, D], normalised, ready for `lm_head`.

        tokens, position_ids: int64 [B, T]; positions below config.max_position. documents: which
        tokens may see each other; all of a row unless given. cache: appended to; the T tokens
        follow those in it.
        """
        if self._rope[0].device != tokens_BT.device:
            self._rope = (self._rope[0].to(tokens_BT.device), self._rope[1].to(tokens_BT.device))
        rope = (
            self._rope[0][position_ids_BT].unsqueeze(2),
            self._rope[1][position_ids_BT].unsqueeze(2),
        )
        x_BTD = self.embed_tokens(tokens_BT)
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            if recompute:
                x_BTD = checkpoint(block, x_BTD, rope, documents, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, rope, documents, cache)
        if cache is not None:
            cache.length += tokens_BT.shape[1]
        return self.final_norm(x_BTD)
