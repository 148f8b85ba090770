"""Chunks of a tensor, one range per axis: splitting flat ranges, intersection, indexing.

ZeRO shards a parameter by flat ranges, tensor parallelism by rows or columns. On disk both are
chunks (as in torch.distributed.checkpoint: an offset and a size per axis), so a checkpoint that was
written under one layout is read under any other.
"""

from __future__ import annotations

import math

Shape = tuple[int, ...]
Chunk = tuple[tuple[int, int], ...]  # (start, stop) per axis


def whole(shape: Shape) -> Chunk:
    """The chunk that covers a tensor of this shape."""
    return tuple((0, size) for size in shape)


def chunk_shape(chunk: Chunk) -> Shape:
    """Sizes of a chunk along each axis."""
    return tuple(stop - start for start, stop in chunk)


def chunk_numel(chunk: Chunk) -> int:
    """Number of elements in a chunk."""
    return math.prod(chunk_shape(chunk))


def split_range(outer: Chunk, start: int, stop: int) -> list[Chunk]:
    """Tile a flat range of a chunk by smaller chunks, each of which is itself a flat range.

    At most 2 n - 1 chunks are needed for n axes: the end of the first row, whole rows, the
    beginning of the last row, and the same one axis further down.

    Args:
        outer: The chunk in which elements are counted, in row-major order.
        start: First element.
        stop: One past the last element.

    Returns:
        Chunks of the same tensor as `outer`, in row-major order.
    """
    if start >= stop:
        return []
    if not outer:
        return [()]
    origin = outer[0][0]
    if len(outer) == 1:
        return [((origin + start, origin + stop),)]
    row_numel = chunk_numel(outer[1:])
    first, last = -(-start // row_numel), stop // row_numel
    if first > last:  # the range lies inside one row
        return _split_row(outer, start // row_numel, start, stop)
    chunks: list[Chunk] = []
    if start < first * row_numel:
        chunks += _split_row(outer, first - 1, start, first * row_numel)
    if first < last:
        chunks.append(((origin + first, origin + last), *outer[1:]))
    if last * row_numel < stop:
        chunks += _split_row(outer, last, last * row_numel, stop)
    return chunks


def _split_row(outer: Chunk, row: int, start: int, stop: int) -> list[Chunk]:
    offset = row * chunk_numel(outer[1:])
    index = outer[0][0] + row
    return [
        ((index, index + 1), *rest)
        for rest in split_range(outer[1:], start - offset, stop - offset)
    ]


def intersect(a: Chunk, b: Chunk) -> Chunk | None:
    """Elements that two chunks of one tensor share; None where they share none."""
    common = tuple((max(p, r), min(q, s)) for (p, q), (r, s) in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def slices_within(chunk: Chunk, outer: Chunk) -> tuple[slice, ...]:
    """Index of `chunk` in a tensor that holds the elements of `outer`."""
    return tuple(
        slice(start - origin, stop - origin)
        for (start, stop), (origin, _) in zip(chunk, outer, strict=True)
    )
