"""Owners of divided matrices: who computes, how much is sent, and in which rounds."""

from __future__ import annotations

import math

import torch

from nextpt.optim.matrix_exchange import (
    Assignment,
    DividedTensor,
    Piece,
    Round,
    assign,
    rounds,
    sent_elements,
)


def cut(name: str, shape: tuple[int, int], *lengths: int) -> DividedTensor:
    """A matrix in consecutive pieces of these lengths, on the ranks from 0 on."""
    starts = [sum(lengths[:rank]) for rank in range(len(lengths))]
    pieces = [Piece(r, s, n) for r, (s, n) in enumerate(zip(starts, lengths, strict=True)) if n]
    return DividedTensor(name, shape, tuple(pieces))


def work(shape: tuple[int, ...]) -> float:
    return float(math.prod(shape))


def owners(assignments: list[Assignment]) -> dict[str, int]:
    return {a.tensor.name: a.owner for a in assignments}


def test_who_holds_a_whole_matrix_keeps_it() -> None:
    matrices = [cut("a", (4, 4), 16, 0), cut("b", (4, 4), 16, 0), cut("c", (4, 2), 1, 7)]
    assignments = assign(matrices, work)
    assert owners(assignments) == {"a": 0, "b": 0, "c": 1}
    assert sent_elements(assignments, 2) == [1, 1]


def test_equal_pieces_are_divided_by_work() -> None:
    matrices = [cut(str(n), (n, 8), *[2 * n] * 4) for n in range(1, 9)]
    assignments = assign(matrices, work)
    loads = [0.0] * 4
    for assignment in assignments:
        loads[assignment.owner] += work(assignment.tensor.shape)
    assert max(loads) <= 1.2 * sum(loads) / 4
    assert [a.tensor.name for a in assignments] == [str(n) for n in range(8, 0, -1)]


def test_what_all_hold_is_computed_once_and_sent_to_all() -> None:
    whole = [
        DividedTensor(name, (4, 4), tuple(Piece(rank, 0, 16) for rank in range(3)))
        for name in "abc"
    ]
    assignments = assign(whole, work)
    assert sorted(owners(assignments).values()) == [0, 1, 2]
    assert sent_elements(assignments, 3) == [32, 32, 32]


def test_every_element_travels_at_most_once_each_way() -> None:
    matrices = [cut("a", (5, 3), 5, 5, 5), cut("b", (7, 3), 7, 7, 7)]
    assert sum(sent_elements(assign(matrices, work), 3)) == 2 * 2 * (5 + 7)


def test_rounds_bound_what_is_in_flight() -> None:
    matrices = [cut(f"m{n}", (4, 4), 8, 8) for n in range(8)] + [cut("local", (4, 4), 16, 0)]
    assignments = assign(matrices, work)
    parts = rounds(assignments, limit=32)
    assert [a.tensor.name for a in parts[0]] == ["local"]
    assert sorted(a.tensor.name for part in parts for a in part) == sorted(
        matrix.name for matrix in matrices
    )
    for part in parts:
        for rank in range(2):
            assert sum(a.tensor.numel for a in part if a.owner == rank) <= 32
    assert all(len(part) == 1 for part in rounds(assign(matrices[:1], work), limit=1))


def test_a_process_by_itself_sends_nothing() -> None:
    matrix = DividedTensor("a", (2, 3), (Piece(0, 0, 6),))
    part = Round(assign([matrix], work), 0, None)
    values = torch.arange(6.0)
    whole = part.gather({"a": values}, values)
    assert torch.equal(whole["a"], values.view(2, 3))
    assert whole["a"].data_ptr() != values.data_ptr()
    assert torch.equal(part.scatter({"a": whole["a"] + 1}, values)["a"], values + 1)
