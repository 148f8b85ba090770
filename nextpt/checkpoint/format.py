"""Checkpoint format on disk: sharded safetensors, their index, and a state file; no pickle.

    step-000000500/
        rank-00000.safetensors   fp32 fragments, one tensor per chunk
        rank-00000.json          parameter, kind of state, full shape and slice per axis of each
                                 tensor; random states of the rank
        state.json               step, config, versions, data position, optimizer scalars, kinds of
                                 state and shapes of the parameters
        manifest.json            sizes and hashes of all other files, lineage; written last

JSON is canonical (sorted keys), so equal state gives equal bytes. A folder is a checkpoint only if
its manifest verifies (manifest.py) and its files agree with each other (index.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nextpt.base.errors import CheckpointError, same_on_all_ranks
from nextpt.base.json_files import sync, write_json
from nextpt.checkpoint.chunks import (
    Chunk,
    Shape,
    chunk_numel,
    chunk_shape,
    intersect,
    slices_within,
    split_range,
    whole,
)
from nextpt.checkpoint.errors import DamagedError, UnsupportedVersionError
from nextpt.checkpoint.index import Entry, read_contents, stored_shapes
from nextpt.checkpoint.manifest import describe
from nextpt.checkpoint.state import AVERAGE, WEIGHT, SavedState, StateShapes

# Bytes. Files are memory-mapped, and what was read counts as memory of this process until they are
# closed. Opening one again reads its header, a few hundred kB at most.
MAX_MAPPED_BYTES = 2**25


@dataclass(frozen=True)
class Snapshot:
    """Copy of one rank's part of a checkpoint; training may go on and change the state.

    Attributes:
        tensors: fp32, one per chunk.
        index: Content of rank-*.json.
        contents: Content of state.json, the same on all ranks.
    """

    tensors: dict[str, Tensor]
    index: dict[str, Any]
    contents: dict[str, Any]

    @property
    def step(self) -> int:
        """Number of optimizer steps."""
        return int(self.contents["step"])


def take_snapshot(
    state: SavedState, extras: Mapping[str, Any], rng: Mapping[str, Any], world_size: int
) -> Snapshot:
    """Copy this rank's fragments.

    Args:
        state: What is saved.
        extras: JSON values for state.json, among them `step`.
        rng: Random states of this rank.
        world_size: Number of ranks that write the checkpoint.
    """
    tensors: dict[str, Tensor] = {}
    entries = []
    for fragment in state.fragments():
        offset = 0
        for chunk in split_range(fragment.outer, fragment.start, fragment.stop):
            key = f"{len(tensors):06d}"
            part = fragment.tensor.detach()[offset : offset + chunk_numel(chunk)]
            # A copy in any case, and one per chunk: safetensors refuses views that share storage.
            tensors[key] = part.to("cpu", torch.float32, copy=True).reshape(chunk_shape(chunk))
            offset += chunk_numel(chunk)
            entries.append(
                {
                    "tensor": key,
                    "name": fragment.name,
                    "kind": fragment.kind,
                    "shape": fragment.shape,
                    "slices": chunk,
                }
            )
    shapes = state.state_shapes()
    contents = {
        **extras,
        "world_size": world_size,
        "scalars": state.scalars(),
        "parameters": {name: list(kinds[WEIGHT]) for name, kinds in shapes.items()},
        "optimizer_state": {
            name: {kind: list(shape) for kind, shape in kinds.items() if kind != WEIGHT}
            for name, kinds in shapes.items()
        },
    }
    return Snapshot(tensors, {"fragments": entries, "rng": rng}, contents)


def write_rank(folder: Path, rank: int, snapshot: Snapshot) -> dict[str, dict[str, Any]]:
    """Write one rank's files durably.

    Returns:
        File name -> size and hash, see `manifest.describe`.
    """
    names = [f"rank-{rank:05d}.safetensors", f"rank-{rank:05d}.json"]
    save_file(snapshot.tensors, folder / names[0])
    sync(folder / names[0])
    write_json(folder / names[1], snapshot.index)
    return {name: describe(folder / name) for name in names}


class Checkpoint:
    """A verified checkpoint, open for reading. A `FragmentReader`.

    Args:
        folder: A folder that was verified (`verification.verify_checkpoint`).

    Attributes:
        state: Content of state.json.
        weights: Kind of state that `read_whole` reads by default, see `select_weights`.

    Raises:
        CheckpointError: Its files do not agree with each other.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.weights = folder, WEIGHT
        try:
            self.state, self._indexes = read_contents(folder)
        except (DamagedError, UnsupportedVersionError) as problem:
            raise CheckpointError(f"checkpoint {folder} is not usable: {problem}") from None
        self._shapes: dict[str, dict[str, Shape]] = {
            name: {kind: tuple(shape) for kind, shape in kinds.items()}
            for name, kinds in stored_shapes(self.state).items()
        }
        self._fragments: dict[tuple[str, str], list[tuple[str, Entry]]] = {}
        for rank, index in enumerate(self._indexes):
            for entry in index.fragments:
                self._fragments.setdefault((entry.name, entry.kind), []).append(
                    (f"rank-{rank:05d}.safetensors", entry)
                )
        self._files: dict[str, Any] = {}
        self._mapped_bytes = 0  # read since the files were opened

    @property
    def step(self) -> int:
        """Number of optimizer steps."""
        return int(self.state["step"])

    def rng(self, rank: int) -> dict[str, Any] | None:
        """Random states of a rank; None when the checkpoint was written by fewer ranks."""
        return self._indexes[rank].rng if rank < len(self._indexes) else None

    def state_shapes(self) -> dict[str, dict[str, Shape]]:
        """Kinds of state of every parameter and their full shapes."""
        return self._shapes

    def shapes(self) -> dict[str, Shape]:
        """Full shape of every parameter's weight."""
        return {name: kinds[WEIGHT] for name, kinds in self._shapes.items()}

    def kinds(self, name: str) -> tuple[str, ...]:
        """Kinds of state of a parameter, sorted."""
        return tuple(sorted(self._shapes[name]))

    def read(
        self, name: str, kind: str, start: int, stop: int, chunk: Chunk | None = None
    ) -> Tensor:
        """Read a range of one kind of state of a parameter, and nothing else.

        Args:
            name: Parameter name.
            kind: Kind of state; must be one of `kinds(name)`.
            start: First element of the range.
            stop: One past the last element of the range.
            chunk: Slice per axis in which the range counts, in row-major order; None for the whole
                tensor.

        Returns:
            fp32 [stop - start].
        """
        outer = whole(self._shapes[name][kind]) if chunk is None else chunk
        out = torch.empty(stop - start, dtype=torch.float32)
        offset = filled = 0
        for target in split_range(outer, start, stop):
            view = out[offset : offset + chunk_numel(target)].view(chunk_shape(target))
            offset += chunk_numel(target)
            for file, entry in self._fragments.get((name, kind), []):
                common = intersect(target, entry.chunk)
                if common is not None:
                    view[slices_within(common, target)] = self._read_slices(
                        file, entry.tensor, slices_within(common, entry.chunk)
                    )
                    filled += chunk_numel(common)
                    self._mapped_bytes += 4 * chunk_numel(common)
        if self._mapped_bytes > MAX_MAPPED_BYTES:
            self.close()
        assert filled == stop - start, (
            f"{name} ({kind}): the fragments were found to tile it when the checkpoint was opened"
        )
        return out

    def read_whole(self, name: str, kind: str | None = None) -> Tensor:
        """One kind of state of a parameter in its full shape, fp32; its `weights` by default."""
        kind = kind or self.weights
        shape = self._shapes[name][kind]
        return self.read(name, kind, 0, chunk_numel(whole(shape))).view(shape)

    def select_weights(self, kind: str) -> None:
        """Let a kind of state, an average of the weights, stand for them in `read_whole`.

        Raises:
            CheckpointError: A parameter has no such average. Those that there are are named.
        """
        averages = [
            {kind for kind in kinds if kind.startswith(AVERAGE)} for kinds in self._shapes.values()
        ]
        choices = [WEIGHT, *sorted(set.intersection(*averages))]
        if kind not in choices:
            raise CheckpointError(
                f"checkpoint {self.folder} has no weights {kind!r}; it has {', '.join(choices)}"
                " (train.ema keeps averages)"
            )
        self.weights = kind

    def close(self) -> None:
        """Close the files; reading opens them again.

        While a file is mapped, removing it frees no space on the disk.
        """
        self._files.clear()
        self._mapped_bytes = 0

    def check_weights(self, shapes: Mapping[str, Shape]) -> None:
        """Check that the parameters are those of a model.

        Args:
            shapes: Parameter -> full shape.

        Raises:
            CheckpointError: The checkpoint is of another model. The first difference is named.
        """
        stored = self.shapes()
        for name in sorted(stored.keys() | shapes.keys()):
            if stored.get(name) != shapes.get(name):
                raise same_on_all_ranks(
                    CheckpointError(
                        f"checkpoint {self.folder} is of another model: parameter {name} has the"
                        f" shape {stored.get(name, 'none')} in it, expected"
                        f" {shapes.get(name, 'none')}; use the config of its run, or another"
                        " run.dir"
                    )
                )

    def check_state(self, state_shapes: StateShapes) -> None:
        """Check that the parameters and their kinds of state are those of a model and an optimizer.

        Averages of the weights may differ: they begin and end as a config says.

        Raises:
            CheckpointError: The checkpoint is of another model, or its optimizer keeps other kinds
                of state. The first difference is named.
        """
        self.check_weights({name: kinds[WEIGHT] for name, kinds in state_shapes.items()})
        for name, expected in sorted(state_shapes.items()):
            if _without_averages(self._shapes[name]) != _without_averages(expected):
                raise same_on_all_ranks(
                    CheckpointError(
                        f"checkpoint {self.folder} is of another optimizer: its state of {name} is"
                        f" {_described(self._shapes[name])}, this optimizer needs"
                        f" {_described(expected)}; a run cannot change its optimizer: use the"
                        " config of its run, or another run.dir"
                    )
                )

    def _read_slices(self, file: str, tensor: str, slices: tuple[slice, ...]) -> Tensor:
        try:
            if file not in self._files:
                self._files[file] = safe_open(self.folder / file, framework="pt")
            part: Tensor = (
                self._files[file].get_slice(tensor)[slices]
                if slices  # a scalar cannot be sliced
                else self._files[file].get_tensor(tensor)
            )
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"checkpoint {self.folder}: {file} cannot be read: {error}"
            ) from error
        return part


def _without_averages(kinds: Mapping[str, Shape]) -> dict[str, Shape]:
    return {kind: shape for kind, shape in kinds.items() if not kind.startswith(AVERAGE)}


def _described(kinds: Mapping[str, Shape]) -> str:
    texts = [f"{kind} {list(kinds[kind])}" for kind in sorted(kinds) if kind != WEIGHT]
    return ", ".join(texts) or "empty"
