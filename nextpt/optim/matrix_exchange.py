"""Matrix exchange: divided matrices are made whole on one rank each, results divided again.

ZeRO divides a matrix among ranks. What needs the whole of it is computed once, by the matrix's
owner: the other holders send their pieces there (`gather`) and get those of the result back
(`scatter`). Which rank owns what is a pure function of names, shapes and pieces, so every rank
knows it without asking, and so does a plan of a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Elements of the matrices of one owner that are in flight at a time. One matrix always may be.
ROUND_ELEMENTS = 2**25


class Piece(NamedTuple):
    """Elements [start, start + length) of a flattened parameter, which a rank holds."""

    rank: int
    start: int
    length: int


@dataclass(frozen=True)
class DividedTensor:
    """A parameter and how it is divided among ranks.

    Attributes:
        name: The parameter.
        shape: Its full shape.
        pieces: By rank; they tile the parameter, or each is the whole of it.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        """Number of elements of the whole parameter."""
        return math.prod(self.shape)


class _Transfer(NamedTuple):
    """A piece on its way between two ranks, or from a rank to itself."""

    name: str
    piece: Piece
    source: int
    target: int


@dataclass(frozen=True)
class Assignment:
    """A matrix and the rank that computes with the whole of it.

    Attributes:
        tensor: The matrix.
        owner: One of its holders.
    """

    tensor: DividedTensor
    owner: int

    @property
    def sources(self) -> tuple[Piece, ...]:
        """The pieces that make the matrix whole on its owner."""
        whole = [p for p in self.tensor.pieces if p.length == self.tensor.numel]
        return tuple(p for p in whole if p.rank == self.owner) or self.tensor.pieces

    @property
    def to_owner(self) -> list[_Transfer]:
        """Transfers that make the matrix whole on its owner."""
        name = self.tensor.name
        return [_Transfer(name, piece, piece.rank, self.owner) for piece in self.sources]

    @property
    def from_owner(self) -> list[_Transfer]:
        """Transfers that divide the result among the holders."""
        name = self.tensor.name
        return [_Transfer(name, piece, self.owner, piece.rank) for piece in self.tensor.pieces]

    @property
    def travels(self) -> bool:
        """Whether a rank other than the owner holds a piece."""
        return any(piece.rank != self.owner for piece in self.tensor.pieces)


def assign(
    matrices: Iterable[DividedTensor], work: Callable[[tuple[int, ...]], float]
) -> list[Assignment]:
    """Give each matrix to one of its holders, so that work is even and little is sent.

    The largest come first (longest processing time first). A rank that holds a whole matrix takes
    it; otherwise the one with the least work so far among those that hold at least half as much of
    it as any.

    Args:
        matrices: Matrices that are exchanged together.
        work: Work of a matrix as a function of its shape.

    Returns:
        Assignments, the most work first.
    """
    loads: dict[int, float] = {}
    assignments = []
    for matrix in sorted(matrices, key=lambda m: (-work(m.shape), m.name)):
        most = max(piece.length for piece in matrix.pieces)
        least = most if most == matrix.numel else most / 2
        candidates = [piece.rank for piece in matrix.pieces if piece.length >= least]
        owner = min(candidates, key=lambda rank: (loads.get(rank, 0.0), rank))
        loads[owner] = loads.get(owner, 0.0) + work(matrix.shape)
        assignments.append(Assignment(matrix, owner))
    return assignments


def rounds(
    assignments: Iterable[Assignment], limit: int = ROUND_ELEMENTS
) -> list[list[Assignment]]:
    """Divide assignments into rounds, each exchanged at once, in the same way on every rank.

    A matrix that nobody sends is a round by itself. In any other round an owner has at most `limit`
    elements, or one matrix.
    """
    alone = [[a] for a in assignments if not a.travels]
    together: list[list[Assignment]] = []
    position: dict[int, tuple[int, int]] = {}  # owner -> (round, its elements there)
    for assignment in assignments:
        if not assignment.travels:
            continue
        number, size = position.get(assignment.owner, (0, 0))
        if size and size + assignment.tensor.numel > limit:
            number, size = number + 1, 0
        if number == len(together):
            together.append([])
        together[number].append(assignment)
        position[assignment.owner] = number, size + assignment.tensor.numel
    return alone + together


def sent_elements(assignments: Iterable[Assignment], ranks: int) -> list[int]:
    """Elements that each rank sends to others in one exchange of all matrices, both ways."""
    sent = [0] * ranks
    for assignment in assignments:
        for transfer in (*assignment.to_owner, *assignment.from_owner):
            if transfer.source != transfer.target:
                sent[transfer.source] += transfer.piece.length
    return sent


class _Leg:
    """One direction of a round: what this rank sends and receives, in the order of the ranks.

    Args:
        transfers: Of all ranks, in one order.
        rank: This rank, in `group`.
        group: The ranks that exchange; None for a process by itself.
    """

    def __init__(
        self, transfers: Sequence[_Transfer], rank: int, group: dist.ProcessGroup | None
    ) -> None:
        ranks = 1 if group is None else dist.get_world_size(group)
        self._group = group
        self.outgoing = sorted((t for t in transfers if t.source == rank), key=lambda t: t.target)
        self.incoming = sorted((t for t in transfers if t.target == rank), key=lambda t: t.source)
        self._travels = any(t.source != t.target for t in transfers)
        self._sends, self._receives = [0] * ranks, [0] * ranks
        for transfer in self.outgoing:
            self._sends[transfer.target] += transfer.piece.length
        for transfer in self.incoming:
            self._receives[transfer.source] += transfer.piece.length

    def send(self, part: Callable[[_Transfer], Tensor], like: Tensor) -> list[Tensor]:
        """Exchange pieces. Collective, unless nothing travels between ranks.

        Args:
            part: The values of an outgoing transfer, 1-D.
            like: Has the dtype and the device of all values.

        Returns:
            The values of each of `incoming`.
        """
        values = [part(transfer) for transfer in self.outgoing]
        if not self._travels:
            return values
        sent = torch.cat(values) if values else like.new_empty(0)
        received = like.new_empty(sum(self._receives))
        dist.all_to_all_single(received, sent, self._receives, self._sends, group=self._group)
        return list(torch.split(received, [t.piece.length for t in self.incoming]))


class Round:
    """One round of the exchange, as this rank takes part in it.

    Args:
        assignments: The same on all ranks.
        rank: This rank, in `group`.
        group: The ranks that the matrices are divided among; None for a process by itself.

    Attributes:
        owned: The matrices that this rank computes with.
        held: Names of the matrices of which this rank has a piece.
        sources: Those of `held` whose piece is needed to make the matrix whole.
    """

    def __init__(
        self, assignments: Sequence[Assignment], rank: int, group: dist.ProcessGroup | None
    ) -> None:
        self.owned = [a.tensor for a in assignments if a.owner == rank]
        self._gather = _Leg([t for a in assignments for t in a.to_owner], rank, group)
        self._scatter = _Leg([t for a in assignments for t in a.from_owner], rank, group)
        self.held = [transfer.name for transfer in self._scatter.incoming]
        self.sources = {transfer.name for transfer in self._gather.outgoing}

    def gather(self, pieces: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
        """Make the matrices of this rank whole. Collective.

        Args:
            pieces: Of every name in `sources`, 1-D.
            like: Has the dtype and the device of all pieces.

        Returns:
            Of each of `owned`: the whole matrix in its shape, in memory of its own.
        """
        parts: dict[str, list[tuple[int, Tensor]]] = {}
        received = self._gather.send(lambda transfer: pieces[transfer.name], like)
        for transfer, values in zip(self._gather.incoming, received, strict=True):
            parts.setdefault(transfer.name, []).append((transfer.piece.start, values))
        return {
            matrix.name: torch.cat(
                [values for _, values in sorted(parts[matrix.name], key=lambda part: part[0])]
            ).view(matrix.shape)
            for matrix in self.owned
        }

    def scatter(self, results: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
        """Send every holder its pieces of the results. Collective.

        Args:
            results: Of each of `owned`, with the elements of the matrix.
            like: Has the dtype and the device of all results.

        Returns:
            Of every name in `held`: this rank's piece, 1-D.
        """
        flat = {name: result.reshape(-1) for name, result in results.items()}

        def part(transfer: _Transfer) -> Tensor:
            return flat[transfer.name].narrow(0, transfer.piece.start, transfer.piece.length)

        received = self._scatter.send(part, like)
        incoming = self._scatter.incoming
        return {t.name: values for t, values in zip(incoming, received, strict=True)}
