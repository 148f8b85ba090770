"""Parameters and FLOPs by formula.

Two FLOP conventions are in use and differ by a tenth or more; both are given.
`training_flops_per_token` counts attention without the causal half (PaLM, arXiv 2204.02311 appendix
B: 6 N + 12 L H E T, N the parameters of all matrix products, the output matrix included and the
input embedding not); `causal_flops_per_token` counts what a causal kernel must do.
"""

from __future__ import annotations

from dataclasses import dataclass

from nextpt.config import Config, ModelSection


@dataclass(frozen=True)
class Counts:
    """Figures of one model shape."""

    parameters: int
    non_embedding_parameters: int
    matmul_parameters: int
    training_flops_per_token: float
    causal_flops_per_token: float


def count(config: Config) -> Counts:
    """Count by formula; tests compare with the module's own parameters."""
    c = config.model
    embedding = c.vocab_size * c.width
    block = _block_matmuls(c) + _block_vectors(c)
    total = embedding * (1 if c.tied_embeddings else 2) + c.depth * block + c.width
    matmul = c.depth * _block_matmuls(c) + embedding
    attention = 12 * c.depth * c.heads * c.head_dim_ * config.data.sequence_length
    return Counts(
        parameters=total,
        non_embedding_parameters=c.depth * block + c.width,
        matmul_parameters=matmul,
        training_flops_per_token=6.0 * matmul + attention,
        causal_flops_per_token=6.0 * matmul + attention / 2,
    )


def _block_matmuls(c: ModelSection) -> int:
    attention = 2 * c.width * c.heads * c.head_dim_ + 2 * c.width * c.kv_heads_ * c.head_dim_
    return attention + (3 if c.ffn == "swiglu" else 2) * c.width * c.ffn_width_


def _block_vectors(c: ModelSection) -> int:
    norms = 2 * c.width + (2 * c.head_dim_ if c.qk_norm else 0)
    if not c.bias:
        return norms
    attention = c.heads * c.head_dim_ + 2 * c.kv_heads_ * c.head_dim_ + c.width
    return norms + attention + (2 if c.ffn == "swiglu" else 1) * c.ffn_width_ + c.width
