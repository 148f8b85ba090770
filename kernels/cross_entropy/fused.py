"""Fused loss in chunks of tokens: logits, their statistics, their gradient in place, two products.

With gradients that is 6 N D V FLOPs, the least there is; without, 2 N D V. The slab of logits is
allocated once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.cross_entropy import rows as rows_torch
from kernels.cross_entropy.chunking import padded
from kernels.cross_entropy.half_sums import HalfSums
from kernels.cross_entropy.products import hidden_gradient_into, logits_into, weight_gradient_into
from kernels.cross_entropy.rows import Coefficients, Statistics


class Problem(NamedTuple):
    """What a loss is computed of.

    Attributes:
        hidden: [N, D].
        weight: [V, D].
        bias: [V] or None.
        targets: int64 [N, K], -1 where there is none.
        softcap: cap of the logits, or None.
        rows: tokens per chunk.
        sums: how chunks of the matrix gradient are summed, see chunking.Sums.
        wide: fp32 logits for 16-bit inputs.
        kernel: "torch" or "triton".
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    softcap: float | None
    rows: int
    sums: str  # one of Sums; operators take strings
    wide: bool
    kernel: str

    @property
    def dtype(self) -> torch.dtype:
        """Of statistics and sums: fp32, fp64 for fp64 inputs."""
        return torch.promote_types(self.hidden.dtype, torch.float32)

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Of the returned matrix gradient."""
        return matrix_gradient_dtype(self.hidden, self.weight)


def matrix_gradient_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of the matrix gradient: in fp16 fp32, until it meets the loss scale."""
    return torch.float32 if hidden.dtype == torch.float16 else weight.dtype


class Gradients(NamedTuple):
    """Gradients of hidden [N, D], weight [V, D] and bias [V]; None where they are not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def empty(cls, p: Problem, needs: Sequence[bool]) -> Gradients:
        """Allocate those of hidden, weight and bias that are needed."""
        hidden = weight = bias = None
        if needs[0]:
            hidden = torch.empty_like(p.hidden, memory_format=torch.contiguous_format)
        if needs[1]:
            wide = p.sums == "fp32" or p.gradient_dtype == torch.float32
            dtype = p.dtype if wide else p.weight.dtype
            weight = torch.empty(p.weight.shape, dtype=dtype, device=p.weight.device)
        if needs[2]:
            bias = torch.zeros(p.weight.shape[0], dtype=p.dtype, device=p.weight.device)
        return cls(hidden, weight, bias)


def run(
    p: Problem,
    needs: Sequence[bool],
    coefficients: Coefficients | None,
    statistics: Statistics | None = None,
    total: bool = False,
    combine: Callable[[slice, Statistics], None] | None = None,
) -> tuple[Statistics, Gradients]:
    """Compute the statistics of all tokens, and gradients.

    Args:
        p: the problem.
        needs: which of the gradients of hidden, weight and bias.
        coefficients: of the gradient of a row, see `rows`; None where no gradient is needed.
        statistics: those of all tokens, where they are known.
        total: whether the sums of logits are needed.
        combine: completes the statistics of a slice of tokens in place, before they are used.
    """
    known = statistics is not None
    if statistics is None:
        tokens, targets = p.targets.shape
        statistics = Statistics.empty(tokens, targets, p.dtype, p.hidden.device, total)
    gradients = Gradients.empty(p, needs)
    if p.hidden.shape[0] == 0:
        return statistics, Gradients(*(None if g is None else g.zero_() for g in gradients))
    slab = Slab(p, any(needs))
    halves = None
    if gradients.weight is not None and coefficients is not None and p.sums == "fp16":
        halves = HalfSums(gradients.weight, p.hidden, coefficients, p.kernel)
    for first in range(0, p.hidden.shape[0], p.rows):
        part = slice(first, first + p.rows)
        logits, g = slab.views(p.hidden[part].shape[0])
        logits_into(logits, p.hidden[part], p.weight)
        row_inputs = p.bias, p.targets[part], p.softcap, statistics.part(part)
        if combine is not None and not known:
            slab.work(logits, None, *row_inputs, None, False)
            combine(part, statistics.part(part))
        if g is not None or combine is None:
            weights = None if coefficients is None else coefficients.part(part)
            slab.work(logits, g, *row_inputs, weights, known or combine is not None)
        if g is not None:
            _add_products(gradients, halves, g, p, part)
    del slab, logits, g  # the narrow result takes their place
    if halves is not None:
        halves.finish()
    elif gradients.weight is not None and gradients.weight.dtype != p.gradient_dtype:
        gradients = gradients._replace(weight=gradients.weight.to(p.gradient_dtype))
    return statistics, gradients


def _add_products(
    gradients: Gradients, halves: HalfSums | None, g: Tensor, p: Problem, part: slice
) -> None:
    """Compute what one chunk's gradient of logits gives."""
    x, is_first = p.hidden[part], part.start == 0
    if gradients.hidden is not None:
        hidden_gradient_into(gradients.hidden[part], g, p.weight)
    if gradients.bias is not None:
        gradients.bias.add_(g.sum(0, dtype=p.dtype))
    if halves is not None:  # last: it writes over g
        halves.add(g, x, is_first)
    elif gradients.weight is not None:
        weight_gradient_into(gradients.weight, g, x, is_first)


class Slab:
    """Memory for the logits of a chunk, which become their own gradient.

    Args:
        p: the problem.
        gradient: whether there is one.
    """

    def __init__(self, p: Problem, gradient: bool) -> None:
        if p.kernel == "triton":
            from kernels.cross_entropy import rows_triton

            self.work = rows_triton.work
        else:
            self.work = rows_torch.work
        dtype = p.dtype if p.wide else p.hidden.dtype
        self._vocabulary = p.weight.shape[0]
        self._gradient = gradient
        self._memory = torch.empty(
            min(p.rows, p.hidden.shape[0]),
            padded(self._vocabulary),
            dtype=dtype,
            device=p.hidden.device,
        )
        if not p.hidden.is_cuda:
            # oneDNN's bf16 product reads rows past their end, up to the width of its tiles, and
            # multiplies what is there by 0: NaN where the memory holds NaN.
            self._memory[:, self._vocabulary :] = 0
        # Triton narrows in place; the CPU's products take fp32 as it is.
        self._narrow = p.hidden.dtype if p.kernel == "triton" or p.hidden.is_cuda else dtype

    def views(self, rows: int) -> tuple[Tensor, Tensor | None]:
        """Return logits [rows, V], and the gradient [rows, V] in the same bytes, or None."""
        logits = self._memory[:rows, : self._vocabulary]
        return logits, (
            self._memory.view(self._narrow)[:rows, : self._vocabulary] if self._gradient else None
        )
