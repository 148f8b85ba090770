"""Damage to files, drawn by Hypothesis: bits, cuts, copies, and wrong values in JSON and YAML."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

# What stands in the place of a value of JSON or YAML
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    2**200,
    0.5,
    -0.0,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "x",
    "1e5",
    "\x00",
    "\ud800",
    "../../../tmp/nextpt-fuzz-outside",
    "/dev/zero",
    "n" * 5_000,
    [],
    [[]],
    [0] * 5_000,
    {},
    {"a": {"b": {}}},
    {"": None},
]
NUMBERS = [
    b"-1",
    b"0",
    b"1e999",
    b"99999999999999999999999",
    b"NaN",
    b"0x10",
    b"1_0",
    b"4294967296",
]
PIECES = [b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"{", b"[" * 100_000, b'"', b"\xed\xa0\x80"]

Edit = Callable[[bytes], bytes]


def edits() -> st.SearchStrategy[Edit]:
    """Draw one change of a file's content."""
    place = st.floats(0, 1)
    length = st.sampled_from([1, 2, 4, 8, 64, 4096])
    return st.one_of(
        st.builds(_flip, place, st.integers(0, 7)),
        st.builds(_cut, place, length),
        st.builds(_truncate, place),
        st.builds(_insert, place, st.one_of(st.sampled_from(PIECES), st.binary(max_size=8))),
        st.builds(_copy, place, place, length),
        st.builds(_number, place, st.sampled_from(NUMBERS)),
        st.builds(_value, place, st.sampled_from(VALUES)),
        st.builds(_value, place, st.sampled_from(VALUES)),
        st.builds(_remove, place),
        st.just(lambda _: b""),
    )


def _at(place: float, size: int) -> int:
    return min(int(place * size), size)


def _flip(place: float, bit: int) -> Edit:
    def edit(content: bytes) -> bytes:
        if not content:
            return content
        index = min(_at(place, len(content)), len(content) - 1)
        return content[:index] + bytes([content[index] ^ 1 << bit]) + content[index + 1 :]

    return edit


def _cut(place: float, length: int) -> Edit:
    def edit(content: bytes) -> bytes:
        start = _at(place, len(content))
        return content[:start] + content[start + length :]

    return edit


def _truncate(place: float) -> Edit:
    return lambda content: content[: _at(place, len(content))]


def _insert(place: float, piece: bytes) -> Edit:
    def edit(content: bytes) -> bytes:
        start = _at(place, len(content))
        return content[:start] + piece + content[start:]

    return edit


def _copy(source: float, target: float, length: int) -> Edit:
    def edit(content: bytes) -> bytes:
        first, start = _at(source, len(content)), _at(target, len(content))
        return content[:start] + content[first : first + length] + content[start + length :]

    return edit


def _number(place: float, number: bytes) -> Edit:
    """Another number in the place of one that is written in the file."""

    def edit(content: bytes) -> bytes:
        written = list(re.finditer(rb"\d+(\.\d+)?", content))
        if not written:
            return content
        match = written[min(_at(place, len(written)), len(written) - 1)]
        return content[: match.start()] + number + content[match.end() :]

    return edit


def _value(place: float, value: Any) -> Edit:
    """Another value in the place of one of JSON or YAML."""

    def edit(content: bytes) -> bytes:
        def change(holder: Any, key: Any) -> None:
            holder[key] = value

        return _structured(content, place, change)

    return edit


def _remove(place: float) -> Edit:
    def edit(content: bytes) -> bytes:
        def change(holder: Any, key: Any) -> None:
            del holder[key]

        return _structured(content, place, change)

    return edit


def _structured(content: bytes, place: float, change: Callable[[Any, Any], None]) -> bytes:
    """Change a value of a file of JSON, of lines of JSON, or of YAML; other files stay."""
    lines = content.splitlines(keepends=True)
    if len(lines) > 1 and (index := _json_line(lines, place)) is not None:
        scaled = place * len(lines) - index  # the place in the line
        return b"".join(
            [*lines[:index], _structured(lines[index], scaled, change), *lines[index + 1 :]]
        )
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        try:
            tree = yaml.safe_load(content)
        except (yaml.YAMLError, RecursionError, ValueError):
            return content
    holders = list(_holders(tree))
    if not holders:
        return content
    change(*holders[min(_at(place, len(holders)), len(holders) - 1)])
    text = json.dumps(tree, default=str)
    return (text + "\n" * content.endswith(b"\n")).encode("utf-8", "surrogatepass")


def _json_line(lines: list[bytes], place: float) -> int | None:
    """The number of the line at a place, where that is an object of JSON."""
    index = min(int(place * len(lines)), len(lines) - 1)
    try:
        return index if isinstance(json.loads(lines[index]), dict) else None
    except (ValueError, RecursionError):
        return None


def _holders(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every (mapping or list, key) of a tree."""
    if not isinstance(tree, dict | list):
        return
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        yield from _holders(value)


def apply(path: Path, changes: list[Edit]) -> None:
    """Apply edits to a file."""
    content = path.read_bytes()
    for change in changes:
        content = change(content)
    path.write_bytes(content)
