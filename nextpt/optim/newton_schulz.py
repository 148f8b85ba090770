"""Newton-Schulz orthogonalization of a matrix, with its FLOP count: the core of Muon.

With the singular value decomposition U = P diag(s) Q^T the iteration approaches P Q^T. It applies
an odd polynomial to the singular values, here of degree 5:

    A = X X^T,    X <- a X + (b A + c A A) X

on the side on which A is small. X starts with Frobenius norm at most 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Of one iteration: a, b, c
Coefficients = tuple[float, float, float]
EPS = 1e-7  # least norm that a matrix is divided by: zeros stay zeros


class Iteration(NamedTuple):
    """Coefficients of an orthogonalization.

    Attributes:
        coefficients: Of each iteration, in order.
        margin: Factor on the Frobenius norm before the first iteration.
    """

    coefficients: tuple[Coefficients, ...]
    margin: float = 1.0


# Keller Jordan's, as in torch.optim.Muon: the steepest polynomial at 0 whose values stay near 1
KELLER: Coefficients = (3.4445, -4.7750, 2.0315)
# arXiv 2505.16932, algorithm 1: best polynomials for five iterations, with a safety factor of 2e-2
# for bf16 and the cushion 2, as printed in github.com/karpathy/nanochat, nanochat/optim.py
POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
POLAR_EXPRESS_MARGIN = 1.02


def iteration(coefficients: str, steps: int) -> Iteration:
    """The iteration of config keys `optimizer.muon.coefficients` and `newton_schulz_steps`."""
    if coefficients == "polar_express":
        return Iteration(POLAR_EXPRESS[:steps], POLAR_EXPRESS_MARGIN)
    return Iteration((KELLER,) * steps)


def orthogonalize(matrix: Tensor, iteration: Iteration) -> Tensor:
    """Approximately the nearest matrix with orthonormal rows or columns.

    A matrix of zeros stays zero. One that is not finite anywhere gives NaN everywhere.

    Args:
        matrix: [rows, columns], in the dtype that is computed in; its norm is computed in fp32.
        iteration: Coefficients.

    Returns:
        [rows, columns], of the dtype of `matrix`.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    norm = torch.linalg.vector_norm(matrix, dtype=torch.float32) * iteration.margin
    x: Tensor = matrix / norm.clamp(min=EPS).to(matrix.dtype)
    x = x.mT if is_tall else x
    for a, b, c in iteration.coefficients:
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def newton_schulz_flops(shape: Sequence[int], steps: int) -> float:
    """FLOPs of an orthogonalization: n = min and m = max of a matrix's sides, 4 n^2 m + 2 n^3 each.

    Three matrix products make an iteration: X X^T and (...) X with 2 n^2 m each, A A with 2 n^3.
    """
    n, m = min(shape), max(shape)
    return float(steps * (4 * n * n * m + 2 * n**3))


def update_scale(scale: str, shape: Sequence[int]) -> float:
    """Factor of an orthogonalized update of a weight [out, in] (`optimizer.muon.scale`).

    original: sqrt(max(1, out / in)), Keller Jordan's and torch's. match_rms_adamw: 0.2
    sqrt(max(out, in)), so that the update's root mean square is 0.2, as AdamW's typically is (arXiv
    2502.16982, section 2.2). spectral: sqrt(out / in), so that activations change alike at any
    width (arXiv 2310.17813).
    """
    out, inputs = shape
    if scale == "match_rms_adamw":
        return 0.2 * math.sqrt(max(out, inputs))
    if scale == "spectral":
        return math.sqrt(out / inputs)
    return math.sqrt(max(1.0, out / inputs))
