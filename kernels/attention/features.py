"""What a call may ask of an implementation beyond plain 16-bit causal attention."""

from __future__ import annotations

from torch import Tensor

WIDEST = 256  # elements of a head, for kernels that keep a tile of it in registers
SHAPES_AND_TYPES = ("fp32", "fp64", "heads wider than 256", "values of another width than keys")


def asked(q: Tensor, v: Tensor, **options: object) -> set[str]:
    """Features that a call needs: options that are not None, and what its shapes and types ask for."""
    found = {name for name, value in options.items() if value is not None}
    for name, needed in zip(
        SHAPES_AND_TYPES,
        (
            q.element_size() == 4,
            q.element_size() == 8,
            max(q.shape[3], v.shape[3]) > WIDEST,
            q.shape[3] != v.shape[3],
        ),
        strict=True,
    ):
        found |= {name} if needed else set()
    return found
