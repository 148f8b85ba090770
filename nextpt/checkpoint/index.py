"""Validation of a checkpoint's JSON files: types, bounds, fragments that tile every parameter once.

The files are not trusted: a checkpoint may be damaged, or come from somewhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from safetensors import SafetensorError, safe_open

from nextpt.base.json_files import read_json
from nextpt.checkpoint.chunks import Chunk, chunk_numel, chunk_shape, intersect, whole
from nextpt.checkpoint.errors import DamagedError
from nextpt.checkpoint.manifest import STATE, read_manifest
from nextpt.checkpoint.state import WEIGHT

# The optimizer state of every parameter in checkpoints whose state.json has no `optimizer_state`:
# until format version 2, AdamW's was implied.
IMPLIED_OPTIMIZER_STATE = ("exp_avg", "exp_avg_sq")

Size = Annotated[int, Field(ge=0, lt=2**63)]
Model = TypeVar("Model", bound=BaseModel)


class State(BaseModel):
    """Keys of state.json that are needed to load it; the writer may put more there.

    Attributes:
        step: Number of optimizer steps.
        world_size: Number of ranks that wrote the checkpoint.
        scalars: `ShardedState.scalars`.
        parameters: Parameter -> full shape of its weight.
        optimizer_state: Parameter -> kind of optimizer state -> full shape; None in checkpoints
            that were written before optimizers named their state.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    step: Size
    world_size: Annotated[int, Field(ge=1, le=10**6)]
    scalars: dict[str, FiniteFloat]
    parameters: dict[str, list[Size]]
    optimizer_state: dict[str, dict[str, list[Size]]] | None = None


class Entry(BaseModel):
    """One tensor of a rank's safetensors file, and the chunk of a parameter's state that it holds.

    Attributes:
        tensor: Key in the safetensors file.
        name: Parameter name.
        kind: Kind of state.
        shape: Full shape of this kind of state.
        slices: [start, stop] along each axis.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    tensor: str = Field(pattern=r"^\d{6,12}$")
    name: str
    kind: str
    shape: list[Size]
    slices: list[Annotated[list[Size], Field(min_length=2, max_length=2)]]

    @property
    def chunk(self) -> Chunk:
        """`slices` as a chunk."""
        return tuple((start, stop) for start, stop in self.slices)


class Index(BaseModel):
    """Content of rank-*.json: the fragments of a rank and its random states."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    fragments: list[Entry]
    rng: dict[str, Any]


Shapes = Mapping[str, Mapping[str, list[int]]]  # parameter -> kind of state -> full shape


def read_state(folder: Path) -> dict[str, Any]:
    """Read state.json, all keys of it, and check those that are known.

    Raises:
        DamagedError: It cannot be read, or a known key is missing or out of bounds.
    """
    value, state = _read(folder / STATE, State)
    if state.optimizer_state is not None:
        for name in sorted(state.parameters.keys() ^ state.optimizer_state.keys()):
            raise DamagedError(f"{STATE}: parameters and optimizer_state differ in {name!r}")
        for name, kinds in state.optimizer_state.items():
            if WEIGHT in kinds:
                raise DamagedError(f"{STATE}: optimizer_state of {name!r} has the kind {WEIGHT!r}")
    return dict(value)


def stored_shapes(state: Mapping[str, Any]) -> dict[str, dict[str, list[int]]]:
    """Kinds of state of every parameter and their full shapes, from a state.json."""
    parameters, optimizer_state = state["parameters"], state.get("optimizer_state")
    if optimizer_state is None:
        kinds = (WEIGHT, *IMPLIED_OPTIMIZER_STATE)
        return {name: dict.fromkeys(kinds, shape) for name, shape in parameters.items()}
    return {name: {WEIGHT: shape, **optimizer_state[name]} for name, shape in parameters.items()}


def read_index(folder: Path, rank: int, shapes: Shapes) -> Index:
    """Read rank-*.json; every entry is a chunk of a kind of state that state.json has.

    Raises:
        DamagedError: It cannot be read, or names something that state.json does not have.
    """
    path = folder / f"rank-{rank:05d}.json"
    _, index = _read(path, Index)
    for entry in index.fragments:
        inside = len(entry.slices) == len(entry.shape) and all(
            a < b <= size for (a, b), size in zip(entry.slices, entry.shape, strict=True)
        )
        if shapes.get(entry.name, {}).get(entry.kind) != entry.shape or not inside:
            raise DamagedError(
                f"{path.name}: tensor {entry.tensor} is slices {entry.slices} of {entry.shape} of"
                f" {entry.name!r} ({entry.kind!r}), which {STATE} does not have room for"
            )
    return index


def _read(path: Path, model: type[Model]) -> tuple[Any, Model]:
    """The value of a JSON file, as it is and as the model sees it."""
    try:
        value = read_json(path)
        return value, model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise DamagedError(
            f"{path.name} is not in order: {'.'.join(map(repr, first['loc']))}: {first['msg']}"
        ) from None
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path.name} cannot be read: {error}") from None


def check_tensors(folder: Path, rank: int, index: Index) -> None:
    """Compare a rank's index with the header of its safetensors file.

    Raises:
        DamagedError: The tensors differ in name, are not fp32, or not of the shape of their chunk.
    """
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
                part, shape = file.get_slice(entry.tensor), list(chunk_shape(entry.chunk))
                if part.get_dtype() != "F32" or part.get_shape() != shape:
                    raise DamagedError(
                        f"{name}: tensor {entry.tensor} is {part.get_dtype()} {part.get_shape()}, "
                        f"its index says F32 {shape}"
                    )
    except (SafetensorError, OSError) as error:
        raise DamagedError(f"{name} cannot be read: {error}") from None


def check_coverage(shapes: Shapes, chunks: Mapping[tuple[str, str], Iterable[Chunk]]) -> None:
    """Check that the chunks cover every element of every kind of state exactly once.

    Chunks that share no element, and together hold as many elements as the tensor, tile it.

    Args:
        shapes: Parameter -> kind of state -> full shape.
        chunks: (parameter, kind of state) -> its chunks.

    Raises:
        DamagedError: There is a gap or an overlap.
    """
    for name, kinds in shapes.items():
        for kind, shape in kinds.items():
            stored = list(chunks.get((name, kind), ()))
            numel = chunk_numel(whole(tuple(shape)))
            if sum(map(chunk_numel, stored)) != numel or _overlap(stored):
                raise DamagedError(f"fragments of {name!r} ({kind}) leave gaps or overlap")


def _overlap(chunks: Iterable[Chunk]) -> bool:
    """Whether two chunks share an element.

    They are sorted by their first axis, so only neighbours along it are compared.
    """
    active: list[Chunk] = []
    for chunk in sorted(chunks):
        if not chunk:  # of a scalar: a second one shows in the sum of the elements
            continue
        active = [other for other in active if other[0][1] > chunk[0][0]]
        if any(intersect(chunk, other) for other in active):
            return True
        active.append(chunk)
    return False


def read_contents(folder: Path) -> tuple[dict[str, Any], list[Index]]:
    """Read the JSON files of a checkpoint and check them against each other and the manifest.

    Hashes and tensors are not read; see `manifest.hash_problem` and `check_tensors`.

    Returns:
        state.json (see `read_state`), and the index of each rank that wrote the checkpoint.

    Raises:
        DamagedError: A file cannot be read, or contradicts another.
        UnsupportedVersionError: The format is newer than this nextpt.
    """
    manifest = read_manifest(folder)
    state = read_state(folder)
    for key in ("step", "world_size"):
        if state[key] != getattr(manifest, key):
            raise DamagedError(
                f"{STATE} says {key} = {state[key]}, the manifest {getattr(manifest, key)}"
            )
    shapes = stored_shapes(state)
    indexes = [read_index(folder, rank, shapes) for rank in range(manifest.world_size)]
    chunks: dict[tuple[str, str], list[Chunk]] = {}
    for index in indexes:
        for entry in index.fragments:
            chunks.setdefault((entry.name, entry.kind), []).append(entry.chunk)
    check_coverage(shapes, chunks)
    return state, indexes
