"""Rotary position embeddings (arXiv 2104.09864) and their scaling to longer contexts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nextpt.config import RopeScaling


def frequencies(head_dim: int, base: float, scaling: RopeScaling | None) -> Tensor:
    """Angular frequencies of a head's pairs, radians per position.

    Args:
        head_dim: Width of a head, even.
        base: Base of the geometric series.
        scaling: Stretching for longer contexts, or None.

    Returns:
        fp64 [head_dim / 2] on the CPU.
    """
    plain = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
    if scaling is None:
        return plain
    stretched = plain / scaling.factor
    if scaling.kind == "linear":  # position interpolation, arXiv 2306.15595
        return stretched
    rotations = scaling.original_max_position * plain / (2 * math.pi)
    if scaling.kind == "llama3":  # Llama 3.1 model card: smooth between the two wavelengths
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = ((rotations - low) / (high - low)).clamp(0, 1)
    else:  # YaRN, arXiv 2309.00071 eq. 23, with the ramp over dimension indices

        def index(r: float) -> float:
            return (
                head_dim
                * math.log(scaling.original_max_position / (2 * math.pi * r))
                / (2 * math.log(base))
            )

        first = max(math.floor(index(scaling.beta_fast)), 0)
        last = min(math.ceil(index(scaling.beta_slow)), head_dim - 1)
        ramp = (torch.arange(head_dim // 2, dtype=torch.float64, device="cpu") - first) / max(
            last - first, 1e-3
        )
        keep = 1 - ramp.clamp(0, 1)
    return plain * keep + stretched * (1 - keep)


def attention_temperature(scaling: RopeScaling | None) -> float:
    """Factor on both queries and keys: 1 except for YaRN (arXiv 2309.00071 eq. 22)."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    return 0.1 * math.log(scaling.factor) + 1.0


def tables(
    positions: int, head_dim: int, base: float, scaling: RopeScaling | None
) -> tuple[Tensor, Tensor]:
    """Tables of (cos, sin) by position, each fp32 [positions, head_dim / 2], on the CPU."""
    angles = torch.outer(
        torch.arange(positions, dtype=torch.float64, device="cpu"),
        frequencies(head_dim, base, scaling),
    )
    temperature = attention_temperature(scaling)
    return (angles.cos() * temperature).float(), (angles.sin() * temperature).float()


def rotate(x_BTHD: Tensor, cos_BT1E: Tensor, sin_BT1E: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of the last axis in fp32; x's dtype is kept. E = D / 2."""
    first, second = x_BTHD.float().chunk(2, dim=-1)
    rotated = torch.cat(
        (first * cos_BT1E - second * sin_BT1E, second * cos_BT1E + first * sin_BT1E), dim=-1
    )
    return rotated.type_as(x_BTHD)
