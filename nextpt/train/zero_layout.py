"""ZeRO layout as a formula: which rank holds which part of each parameter, before a run is started.

As DeepSpeed 0.19.8 divides them (tests/distributed/test_muon.py compares), for plans of runs.
`zero_state.py` has the layout of an engine that exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from nextpt.optim.matrix_exchange import DividedTensor, Piece
from nextpt.optim.spec import OptimizerSpec

# Elements per rank to a multiple of which DeepSpeed pads a flat group (4 bytes of bf16, for NCCL)
ALIGNMENT = 2

Shapes = Mapping[str, tuple[int, ...]]


def zero_layout(
    spec: OptimizerSpec, shapes: Shapes, stage: int, ranks: int
) -> Iterator[list[DividedTensor]]:
    """Yield the parameters of each group of an optimizer, divided among ranks.

    At stage 0 every rank holds the whole of each. At stages 1 and 2 a group is one flat tensor,
    padded and cut into equal parts. At stage 3 each parameter is cut into equal parts, the last of
    which may be shorter; that DeepSpeed steps a very large group in several parts is left out.

    Args:
        spec: The optimizer.
        shapes: Full shape of every parameter, in the order of the model.
        stage: ZeRO stage.
        ranks: Number of ranks that divide the data.
    """
    for names in spec.names_by_group(shapes).values():
        if names:
            yield _divide({name: shapes[name] for name in names}, stage, ranks)


def _divide(shapes: Shapes, stage: int, ranks: int) -> list[DividedTensor]:
    total = sum(map(math.prod, shapes.values()))
    part = -(-total // (ALIGNMENT * ranks)) * ALIGNMENT  # of the flat group
    offset, divided = 0, []
    for name, shape in shapes.items():
        numel = math.prod(shape)
        if stage == 0:
            pieces = [Piece(rank, 0, numel) for rank in range(ranks)]
        elif stage == 3:
            pieces = _cut(numel, -(-numel // ranks), 0)
        else:
            pieces = _cut(numel, part, offset)
        divided.append(DividedTensor(name, shape, tuple(pieces)))
        offset += numel
    return divided


def _cut(numel: int, part: int, offset: int) -> list[Piece]:
    """Cut a parameter where the flat tensor that it begins at `offset` of is cut into parts."""
    pieces = []
    for rank in range(offset // part, -(-(offset + numel) // part)):
        start, stop = max(rank * part, offset), min((rank + 1) * part, offset + numel)
        pieces.append(Piece(rank, start - offset, stop - start))
    return pieces
