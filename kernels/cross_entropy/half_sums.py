"""Sums of bf16 products in fp16, which keeps 11 bits where bf16 keeps 8, within the result.

fp16 has little range, so all is scaled by powers of two, which change no digit: logit gradients to
at most 2^12 (a z-loss may add to that: there is room for 15 times as much), hidden states to at
most 1, and the product of N tokens by 1 / 4N, so that sums stay below 2^14. Nothing is lost above
2^-29 of the largest logit gradient. Two scales are found on the device, from bounds and not from
products, so that they are known before the first chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cross_entropy.products import half_product_into
from kernels.cross_entropy.rows import Coefficients


class HalfSums:
    """Sum of g^T x over chunks for a bf16 matrix, whose memory it uses until `finish`.

    Args:
        result: bf16 [V, D].
        hidden: [N, D], all x.
        coefficients: of the gradients g.
        kernel: "torch" or "triton".
    """

    def __init__(
        self, result: Tensor, hidden: Tensor, coefficients: Coefficients, kernel: str
    ) -> None:
        # Interpreted stores to bf16 truncate
        self._triton, c = kernel == "triton" and hidden.is_cuda, coefficients
        bound = 2 * c.b.abs().sum(1)  # of |gradient_j|, see rows.py; p is at most 1
        for part in (c.linear, c.flat):
            bound = bound if part is None else bound + part.abs()
        self._result = result
        self._sums = result.view(torch.float16)
        self._of_g = power_of_two_over(torch.linalg.vector_norm(bound, torch.inf)) * 2.0**12
        self._of_x = power_of_two_over(torch.linalg.vector_norm(hidden, torch.inf).float())
        self._alpha = 2.0 ** -(2 + (hidden.shape[0] - 1).bit_length())

    def add(self, g: Tensor, x: Tensor, first: bool) -> None:
        """Add a chunk: g [n, V], which is written over, and x [n, D]."""
        half_product_into(self._sums, g, x, (self._of_g, self._of_x), self._alpha, first)

    def finish(self) -> None:
        """Put the sums, without scales and in bf16, into the result."""
        factor = 1 / (self._of_g * self._of_x * self._alpha)
        if self._triton:
            from kernels.cross_entropy.scale_triton import scale

            scale(self._sums, factor, self._result)
        else:  # one after the other: torch would multiply in fp16, whose range ends at 2^16
            self._result.copy_(self._sums).mul_(factor)


def power_of_two_over(most: Tensor) -> Tensor:
    """Return the power of two that brings `most`, a scalar of at least 2^-100, to [0.5, 1)."""
    most = most.clamp_min(2.0**-100)
    return torch.frexp(most).mantissa / most
