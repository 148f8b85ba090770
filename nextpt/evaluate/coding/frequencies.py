"""Integer frequencies of 2^BITS from logits, the same for the encoder and the decoder."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from nextpt.evaluate.coding.coder import BITS


def cumulative(logits_BV: Tensor) -> np.ndarray:
    """Divide 2^BITS among the tokens in proportion to their probabilities.

    f_i = floor(p_i (2^BITS - V)) + 1; what is left over goes to the most probable token. The
    softmax is in fp64. The rounding costs KL(p || f / 2^BITS), below 0.0003 % of the code length at
    131,072 tokens (measured in tests).

    Args:
        logits_BV: fp32 on the CPU, finite.

    Returns:
        int64 [B, V + 1], from 0 to 2^BITS: the edges of the tokens' parts, each at least one wide.
    """
    logits = logits_BV.numpy().astype(np.float64)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    parts = (
        np.floor(weights / weights.sum(axis=1, keepdims=True) * (2**BITS - logits.shape[1])).astype(
            np.int64
        )
        + 1
    )
    rows = np.arange(len(parts))
    parts[rows, logits.argmax(axis=1)] += 2**BITS - parts.sum(axis=1)
    ends = np.zeros((len(parts), parts.shape[1] + 1), np.int64)
    np.cumsum(parts, axis=1, out=ends[:, 1:])
    return ends
