"""What a checkpoint holds, without knowing who trains: the protocol between an engine and the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Fragment:
    """Elements [start, stop), in row-major order, of one kind of value of one parameter.

    Args:
        name: The parameter.
        kind: "weight", or a kind of optimizer state.
        shape: Full shape of this kind of value of this parameter.
        start: First flat element.
        stop: Flat element after the last.
        tensor: 1-D fp32 with stop - start elements.
    """

    name: str
    kind: str
    shape: Shape
    start: int
    stop: int
    tensor: Tensor


class FragmentReader(Protocol):
    """Reads any range of any parameter, however it was divided when it was written."""

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor: ...


class ShardedState(Protocol):
    """Weights and optimizer state, divided among ranks in any way."""

    def fragments(self) -> Iterator[Fragment]:
        """This rank's fragments. Over all ranks each element of each kind comes exactly once."""
        ...

    def scalars(self) -> dict[str, float]:
        """Numbers that are the same on all ranks."""
        ...

    def load(self, reader: FragmentReader, scalars: dict[str, float]) -> None:
        """Replace this rank's part. Collective."""
        ...

    def state_shapes(self) -> dict[str, dict[str, Shape]]:
        """Full shape of every kind of value of every parameter: {parameter: {kind: shape}}.

        Each parameter has the kind "weight"; the others are its optimizer state.
        """
        ...
