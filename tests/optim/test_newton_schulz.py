"""Newton-Schulz orthogonalization: singular values, zeros, precision, scales and FLOPs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nextpt.optim.newton_schulz import (
    KELLER,
    Iteration,
    iteration,
    newton_schulz_flops,
    orthogonalize,
    update_scale,
)

CUBIC = (2.0, -1.5, 0.5)  # keeps 1 and has no slope there


def matrix(rows: int, columns: int, values: torch.Tensor | None = None) -> torch.Tensor:
    """A random matrix, normal or with these singular values."""
    random = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    if values is None:
        return random
    u, _, vh = torch.linalg.svd(random, full_matrices=False)
    return u * values @ vh


def singular_values(result: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(result.float())


@pytest.mark.parametrize("shape", [(96, 336), (336, 96), (64, 64)])
@pytest.mark.parametrize(
    ("coefficients", "low", "high"),
    [
        (iteration("keller", 5), 0.67, 1.14),
        (iteration("polar_express", 5), 0.85, 1.15),
        (Iteration((*[KELLER] * 8, CUBIC, CUBIC)), 0.999, 1.001),
    ],
    ids=["keller", "polar_express", "keller_then_cubic"],
)
def test_singular_values_come_near_one(
    shape: tuple[int, int], coefficients: Iteration, low: float, high: float
) -> None:
    u = matrix(*shape, values=torch.linspace(1.0, 0.1, min(shape)))
    values = singular_values(orthogonalize(u, coefficients))
    assert low <= values.min() and values.max() <= high


@pytest.mark.parametrize("shape", [(48, 112), (112, 48)])
def test_directions_are_those_of_the_matrix(shape: tuple[int, int]) -> None:
    u = matrix(*shape, values=torch.linspace(1.0, 0.1, 48))
    left, _, right = torch.linalg.svd(u, full_matrices=False)
    result = orthogonalize(u, Iteration((*[KELLER] * 8, CUBIC, CUBIC)))
    torch.testing.assert_close(result, left @ right, atol=2e-3, rtol=0)


def test_size_does_not_matter() -> None:
    u, five = matrix(24, 40), iteration("keller", 5)
    torch.testing.assert_close(orthogonalize(1e-3 * u, five), orthogonalize(u, five))


def test_zeros_stay_zero_and_nan_spreads() -> None:
    five = iteration("polar_express", 5)
    assert not orthogonalize(torch.zeros(8, 6), five).any()
    spoiled = torch.ones(8, 6)
    spoiled[3, 2] = float("nan")
    assert orthogonalize(spoiled, five).isnan().all()


def test_bf16_is_enough() -> None:
    five, u = iteration("keller", 5), matrix(64, 128)
    values = singular_values(orthogonalize(u.bfloat16(), five))
    assert values.min() > 0.6 and values.max() < 1.2


def test_steps_are_counted() -> None:
    assert iteration("keller", 7).coefficients == (KELLER,) * 7
    assert len(iteration("polar_express", 3).coefficients) == 3


@pytest.mark.parametrize("shape", [(32, 80), (80, 32), (48, 48)])
def test_flops_are_those_of_the_products(shape: tuple[int, int]) -> None:
    u = matrix(*shape)
    with FlopCounterMode(display=False) as counter:
        orthogonalize(u, iteration("keller", 5))
    assert counter.get_total_flops() == newton_schulz_flops(shape, 5)


def test_scales() -> None:
    assert update_scale("original", (256, 64)) == 2 and update_scale("original", (64, 256)) == 1
    assert update_scale("spectral", (64, 256)) == 0.5 and update_scale("spectral", (256, 64)) == 2
    for shape in ((64, 256), (256, 64)):
        # An orthogonal matrix of 64 singular values has the root mean square 1 / 16
        assert update_scale("match_rms_adamw", shape) / 16 == pytest.approx(0.2)
