"""Parameter and FLOP counts of a decoder, by formula from its spec.

Two FLOP conventions are in use and differ by a tenth or more; both are given.
`training_flops_per_token` counts attention without the causal half (PaLM, arXiv 2204.02311 appendix
B: 6 N + 12 L H E T, N the parameters of all matrix products, the output matrix included and the
input embedding not); `causal_flops_per_token` counts what a causal kernel must do. In a layer with
a window the context is the window: the first convention counts all its keys,
the second only those that exist.
"""

from __future__ import annotations

from dataclasses import dataclass

from nextpt.model.spec import ModelSpec


@dataclass(frozen=True)
class Counts:
    """Parameters and training FLOPs per token (forward and backward) of one model.

    Attributes:
        parameters: All parameters; a tied matrix once.
        non_embedding_parameters: Without the embedding, the output matrix and those of
            multi-token prediction.
        mtp_parameters: Of the modules of multi-token prediction, which only training has; part of
            `parameters` and of no other count of them.
        matmul_parameters: Parameters of matrix products: the blocks' and the output matrix's.
        training_flops_per_token: 6 N + attention, the causal half not taken off (PaLM); modules of
            multi-token prediction and their use of the output matrix included.
        causal_flops_per_token: 6 N + half of the attention; of a window w in a context of T tokens
            the part 1 - w / 2T, since early tokens see less.
        cache_elements: Keys and values of one sequence of that context in a `KVCache`.
    """

    parameters: int
    non_embedding_parameters: int
    mtp_parameters: int
    matmul_parameters: int
    training_flops_per_token: float
    causal_flops_per_token: float
    cache_elements: int


def count(spec: ModelSpec, sequence_length: int | None = None) -> Counts:
    """Count parameters and FLOPs by formula; tests compare with the module's own parameters.

    Args:
        spec: Shape of the model.
        sequence_length: Context of the attention FLOPs, tokens; `spec.max_position` by default.
    """
    embedding = spec.vocab_size * spec.width
    block = _block_matmuls(spec) + _block_vectors(spec)
    blocks = spec.depth * block + (spec.depth - 1 if spec.value_residual else 0)
    total = embedding * (1 if spec.tied_embeddings else 2) + blocks + spec.width
    matmul = spec.depth * _block_matmuls(spec) + embedding
    length = spec.max_position if sequence_length is None else sequence_length
    depth = spec.mtp_depth
    mtp = block + (spec.bias + 2 + 2 * spec.width) * spec.width
    mtp += 1 if spec.value_residual and spec.depth > 1 else 0
    products = matmul + depth * (_block_matmuls(spec) + 2 * spec.width**2 + embedding)
    contexts = [min(window or length, length) for window in spec.windows]
    trained = contexts + contexts[-1:] * depth  # the modules have layers like the last one
    attention = 12 * spec.heads * spec.head_dim * sum(trained)
    causal = 12 * spec.heads * spec.head_dim * sum(w * (1 - w / (2 * length)) for w in trained)
    cached = contexts if spec.has_mixed_windows else [length] * spec.depth
    return Counts(
        parameters=total + depth * mtp,
        non_embedding_parameters=blocks + spec.width,
        mtp_parameters=depth * mtp,
        matmul_parameters=matmul,
        training_flops_per_token=6.0 * products + attention,
        causal_flops_per_token=6.0 * products + causal,
        cache_elements=2 * spec.kv_heads * spec.head_dim * sum(cached),
    )


def _block_matmuls(spec: ModelSpec) -> int:
    attention = 2 * spec.width * (spec.heads + spec.kv_heads) * spec.head_dim
    attention += spec.width * spec.attention_gates
    return attention + (3 if spec.ffn == "swiglu" else 2) * spec.width * spec.ffn_width


def _block_vectors(spec: ModelSpec) -> int:
    vectors = 2 * spec.width + (2 * spec.head_dim if spec.qk_norm else 0)
    vectors += spec.heads if spec.attention_sinks else 0
    if not spec.bias:
        return vectors
    attention = (spec.heads + 2 * spec.kv_heads) * spec.head_dim + spec.width + spec.attention_gates
    return vectors + attention + (2 if spec.ffn == "swiglu" else 1) * spec.ffn_width + spec.width
