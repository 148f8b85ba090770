"""Ranges of flattened tensors as boxes: one slice per axis.

ZeRO divides parameters along flat ranges; a fragment on disk carries a slice per axis, so that any
other division (by rows, by columns, by experts) can be written and read in the same form.
"""

from __future__ import annotations

import math

Box = tuple[tuple[int, int], ...]


def boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Boxes that tile the elements [start, stop) of a row-major tensor, in order.

    Each is itself one flat range.

    At most 2 n - 1 of them for n axes: part of a first row, whole rows, part of a last row, and so
    on downwards.
    """
    if start >= stop:
        return []
    if len(shape) <= 1:
        return [((start, stop),)] if shape else [()]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # inside one row
        return _in_row(shape, start // row, start, stop)
    found: list[Box] = []
    if start < first * row:
        found += _in_row(shape, first - 1, start, first * row)
    if first < last:
        found.append(((first, last), *((0, size) for size in shape[1:])))
    if last * row < stop:
        found += _in_row(shape, last, last * row, stop)
    return found


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> list[Box]:
    offset = row * math.prod(shape[1:])
    return [((row, row + 1), *rest) for rest in boxes(shape[1:], start - offset, stop - offset)]


def volume(box: Box) -> int:
    """Elements in a box."""
    return math.prod(stop - start for start, stop in box)


def intersection(a: Box, b: Box) -> Box | None:
    """The common box, or None."""
    common = tuple((max(p, r), min(q, s)) for (p, q), (r, s) in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """Slices that pick `box` from a tensor that holds `outer`."""
    return tuple(
        slice(start - o, stop - o) for (start, stop), (o, _) in zip(box, outer, strict=True)
    )
