"""Sharded training state: the protocol between an engine and the checkpoint.

A parameter has one or more kinds of state: its weight, and whatever its optimizer keeps for it. The
checkpoint knows no optimizer. The state names the kinds, and a checkpoint records them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from nextpt.checkpoint.chunks import Chunk, Shape, whole

WEIGHT = "weight"  # the kind of state that every parameter has
AVERAGE = "ema-"  # begin of the kinds that are averages of the weight

# parameter -> kind of state -> full shape
StateShapes = Mapping[str, Mapping[str, Shape]]


def average_kind(decay: float) -> str:
    """Kind of state of the exponential moving average with a decay, such as "ema-0.999"."""
    return f"{AVERAGE}{decay}"


@dataclass(frozen=True)
class Fragment:
    """Part of one kind of state of one parameter, as a rank holds it.

    A rank holds the flat range [start, stop), in row-major order, of a chunk of the tensor. For
    ZeRO the chunk is the whole tensor; for a tensor-parallel shard it is its rows or columns.

    Attributes:
        name: Parameter name.
        kind: Kind of state, for example `WEIGHT` or "exp_avg".
        shape: Full shape of this kind of state, over all ranks.
        start: First element of the range.
        stop: One past the last element of the range.
        tensor: fp32, 1-D, stop - start elements.
        chunk: Slice per axis in which the range is counted; None for the whole tensor.
    """

    name: str
    kind: str
    shape: Shape
    start: int
    stop: int
    tensor: Tensor
    chunk: Chunk | None = None

    @property
    def outer(self) -> Chunk:
        """The chunk in which `start` and `stop` count."""
        return whole(self.shape) if self.chunk is None else self.chunk


class FragmentReader(Protocol):
    """Source of state that reads any range, however the state was sharded when it was written."""

    def read(
        self, name: str, kind: str, start: int, stop: int, chunk: Chunk | None = None
    ) -> Tensor:
        """Elements [start, stop) of a kind of state, fp32 [stop - start]; see `Fragment`."""
        ...


class SavedState(Protocol):
    """What a checkpoint is written from."""

    def fragments(self) -> Iterator[Fragment]:
        """Fragments of this rank; over all ranks, each element of each kind comes exactly once."""
        ...

    def scalars(self) -> dict[str, float]:
        """Numbers that are the same on all ranks."""
        ...

    def state_shapes(self) -> StateShapes:
        """Kinds of state of every parameter and their full shapes. `WEIGHT` is always among them.

        The same on all ranks. The others are those of the optimizer, and averages of the weight.
        """
        ...


class ShardedState(SavedState, Protocol):
    """Weights and optimizer state, sharded over the ranks in any way."""

    def load(self, reader: FragmentReader, scalars: dict[str, float]) -> None:
        """Replace this rank's shard with what `reader` holds. Collective."""
        ...
