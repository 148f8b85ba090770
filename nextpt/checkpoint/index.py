"""What a checkpoint's JSON files must hold to be believed: types, bounds, and fragments that tile every parameter once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from nextpt.base.json_files import read_json
from nextpt.checkpoint.chunks import Box, intersection, volume
from nextpt.checkpoint.manifest import STATE, DamagedError, read_manifest

# The optimizer state of every parameter in checkpoints whose state.json has no "optimizer_state".
UNNAMED_KINDS = ("exp_avg", "exp_avg_sq")
Size = Annotated[int, Field(ge=0, lt=2**63)]


class State(BaseModel):
    """What loading needs of state.json; whoever wrote it may put more there."""

    model_config = ConfigDict(strict=True, frozen=True)

    step: Size
    world_size: Annotated[int, Field(ge=1, le=10**6)]
    scalars: dict[str, FiniteFloat]
    parameters: dict[str, list[Size]]
    # {parameter: {kind: shape}}; checkpoints from before optimizers named their state lack it
    optimizer_state: dict[str, dict[str, list[Size]]] | None = None


class Entry(BaseModel):
    """One tensor of a rank's safetensors file: which part of which parameter it is."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    tensor: str = Field(pattern=r"^\d{6,12}$")
    name: str
    kind: str
    shape: list[Size]
    slices: list[Annotated[list[Size], Field(min_length=2, max_length=2)]]

    @property
    def box(self) -> Box:
        return tuple((start, stop) for start, stop in self.slices)


class Index(BaseModel):
    """rank-*.json."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    fragments: list[Entry]
    rng: dict[str, Any]


def read_state(folder: Path) -> dict[str, Any]:
    """state.json, its known keys checked. Raises DamagedError."""
    return _read(folder / STATE, TypeAdapter(State), keep=True)


def shapes_of(state: dict[str, Any]) -> dict[str, dict[str, list[int]]]:
    """{parameter: {kind: shape}} of a state.json."""
    parameters, stored = state["parameters"], state.get("optimizer_state")
    if stored is None:
        kinds = dict.fromkeys(("weight", *UNNAMED_KINDS))
        return {name: dict.fromkeys(kinds, shape) for name, shape in parameters.items()}
    return {name: stored.get(name, {}) | {"weight": shape} for name, shape in parameters.items()}


def read_index(folder: Path, rank: int, shapes: dict[str, dict[str, list[int]]]) -> Index:
    """rank-*.json; every entry is a box inside a kind of a parameter that state.json knows.

    Raises DamagedError.
    """
    path = folder / f"rank-{rank:05d}.json"
    index = _read(path, TypeAdapter(Index))
    for entry in index.fragments:
        shape = shapes.get(entry.name, {}).get(entry.kind)
        inside = len(entry.slices) == len(entry.shape) and all(
            a < b <= size for (a, b), size in zip(entry.slices, entry.shape, strict=True)
        )
        if shape is None or shape != entry.shape or not inside:
            raise DamagedError(
                f"{path.name}: tensor {entry.tensor} is slices {entry.slices} of {entry.shape} of"
                f" {entry.name!r} ({entry.kind!r}), which {STATE} does not have room for"
            )
    return index


def _read(path: Path, kind: TypeAdapter, keep: bool = False) -> Any:
    try:
        value = read_json(path)
        checked = kind.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise DamagedError(
            f"{path.name} is not in order: {'.'.join(map(repr, first['loc']))}: {first['msg']}"
        ) from None
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path.name} cannot be read: {error}") from None
    return value if keep else checked


def check_tensors(folder: Path, rank: int, index: Index) -> None:
    """Compare an index with the header of its safetensors file: the same tensors, fp32, each of its box's size. Raises DamagedError."""
    name = f"rank-{rank:05d}.safetensors"
    try:
        with safe_open(folder / name, framework="pt") as file:
            stored = set(file.keys())
            if (
                len(index.fragments) != len(stored)
                or {entry.tensor for entry in index.fragments} != stored
            ):
                raise DamagedError(f"{name} and its index do not name the same tensors")
            for entry in index.fragments:
                part, sides = file.get_slice(entry.tensor), [b - a for a, b in entry.slices]
                if part.get_dtype() != "F32" or part.get_shape() != sides:
                    raise DamagedError(
                        f"{name}: tensor {entry.tensor} is {part.get_dtype()} {part.get_shape()}, "
                        f"its index says F32 {sides}"
                    )
    except (SafetensorError, OSError) as error:
        raise DamagedError(f"{name} cannot be read: {error}") from None


def check_coverage(
    shapes: dict[str, dict[str, list[int]]], entries: dict[tuple[str, str], list[Box]]
) -> None:
    """Every element of every kind of every parameter comes exactly once. Raises DamagedError.

    Boxes that share no element and hold as many elements together as the kind has tile it.
    """
    for name, kinds in shapes.items():
        for kind, shape in kinds.items():
            found = entries.get((name, kind), [])
            if sum(map(volume, found)) != math.prod(shape) or _overlap(found):
                raise DamagedError(f"fragments of {name!r} ({kind}) leave gaps or overlap")


def _overlap(found: Iterable[Box]) -> bool:
    """Whether two boxes share an element.

    Sorted by their first axis, only neighbours there are compared.
    """
    active: list[Box] = []
    for box in sorted(found):
        if not box:  # of a scalar: a second one is a second volume
            continue
        active = [other for other in active if other[0][1] > box[0][0]]
        if any(intersection(box, other) for other in active):
            return True
        active.append(box)
    return False


def read_contents(folder: Path) -> tuple[dict[str, Any], list[Index]]:
    """(state.json, index of each rank) of a folder, checked against each other and the manifest.

    Raises DamagedError, UnsupportedVersionError.

    Hashes are not looked at, and neither are tensors: see check_tensors.
    """
    manifest = read_manifest(folder)
    state = read_state(folder)
    for key in ("step", "world_size"):
        if state[key] != getattr(manifest, key):
            raise DamagedError(
                f"{STATE} says {key} = {state[key]}, the manifest {getattr(manifest, key)}"
            )
    shapes = shapes_of(state)
    indexes = [read_index(folder, rank, shapes) for rank in range(manifest.world_size)]
    found: dict[tuple[str, str], list[Box]] = {}
    for index in indexes:
        for entry in index.fragments:
            found.setdefault((entry.name, entry.kind), []).append(entry.box)
    check_coverage(shapes, found)
    return state, indexes
