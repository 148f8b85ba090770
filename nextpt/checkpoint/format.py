"""The form of a checkpoint on disk.

    step-000000500/
        rank-00000.safetensors   fp32 fragments; one tensor per box
        rank-00000.json          which parameter, kind, full shape and slice per axis each tensor
        is; random states state.json               step, config, versions, data position, optimizer
        scalars, parameter shapes manifest.json            sizes and hashes of all other files, and
        the line of training; written last

JSON is canonical (sorted keys), so equal state gives equal bytes. Nothing is pickled. A folder is a
checkpoint only if its manifest verifies (manifest.py) and its parts fit together (index.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nextpt.base.errors import CheckpointError
from nextpt.base.json_files import sync, write_json
from nextpt.checkpoint.chunks import boxes, intersection, volume, within
from nextpt.checkpoint.index import Entry, read_contents, shapes_of
from nextpt.checkpoint.manifest import DamagedError, UnsupportedVersionError, describe
from nextpt.checkpoint.state import Shape, ShardedState

# bytes. Files are mapped to be read; opening one again reads its header, a few hundred kB at most
MOST_MAPPED = 2**25


@dataclass(frozen=True)
class Snapshot:
    """One rank's part of a checkpoint in memory of its own: training may go on and change the state.

    tensors: fp32, one per box. index: rank-*.json. contents: state.json, the same on all ranks.
    """

    tensors: dict[str, Tensor]
    index: dict[str, Any]
    contents: dict[str, Any]

    @property
    def step(self) -> int:
        return self.contents["step"]


def take_snapshot(
    state: ShardedState, extras: dict[str, Any], rng: dict[str, Any], world_size: int
) -> Snapshot:
    """Copy this rank's fragments. extras: JSON values for state.json, with `step`.

    rng: this rank's random states.
    """
    tensors: dict[str, Tensor] = {}
    entries = []
    for fragment in state.fragments():
        offset = 0
        for box in boxes(fragment.shape, fragment.start, fragment.stop):
            key = f"{len(tensors):06d}"
            part = fragment.tensor.detach()[offset : offset + volume(box)]
            # A copy in any case, and one per box: safetensors refuses views that share storage.
            tensors[key] = part.to("cpu", torch.float32, copy=True).reshape([b - a for a, b in box])
            offset += volume(box)
            entries.append(
                {
                    "tensor": key,
                    "name": fragment.name,
                    "kind": fragment.kind,
                    "shape": fragment.shape,
                    "slices": box,
                }
            )
    shapes = state.state_shapes()
    contents = extras | {
        "world_size": world_size,
        "scalars": state.scalars(),
        "parameters": {name: list(kinds["weight"]) for name, kinds in shapes.items()},
        "optimizer_state": {
            name: {kind: list(shape) for kind, shape in kinds.items() if kind != "weight"}
            for name, kinds in shapes.items()
        },
    }
    return Snapshot(tensors, {"fragments": entries, "rng": rng}, contents)


def write_rank(folder: Path, rank: int, snapshot: Snapshot) -> dict[str, dict[str, Any]]:
    """Write one rank's files, durably; returns {file name: description}."""
    names = [f"rank-{rank:05d}.safetensors", f"rank-{rank:05d}.json"]
    save_file(snapshot.tensors, folder / names[0])
    sync(folder / names[0])
    write_json(folder / names[1], snapshot.index)
    return {name: describe(folder / name) for name in names}


class Checkpoint:
    """A checkpoint that was verified.

    `state`: what state.json holds. Raises CheckpointError when its parts do not fit together.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.state, self._ranks = read_contents(folder)
        except (DamagedError, UnsupportedVersionError) as problem:
            raise CheckpointError(f"checkpoint {folder} is not usable: {problem}") from None
        self._fragments: dict[tuple[str, str], list[tuple[str, Entry]]] = {}
        for rank, index in enumerate(self._ranks):
            for entry in index.fragments:
                self._fragments.setdefault((entry.name, entry.kind), []).append(
                    (f"rank-{rank:05d}.safetensors", entry)
                )
        self._shapes = self.state_shapes()
        self._open: dict[str, Any] = {}
        # Bytes read since the files were opened: so much of them counts as memory of this process
        self._mapped = 0

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def rng(self, rank: int) -> dict[str, Any] | None:
        """Random states of a rank; None when the checkpoint was written by fewer."""
        return self._ranks[rank].rng if rank < len(self._ranks) else None

    def shapes(self) -> dict[str, Shape]:
        """Full shape of every parameter."""
        return {name: tuple(shape) for name, shape in self.state["parameters"].items()}

    def state_shapes(self) -> dict[str, dict[str, Shape]]:
        """Full shape of every kind of value of every parameter: {parameter: {kind: shape}}."""
        return {
            name: {kind: tuple(shape) for kind, shape in kinds.items()}
            for name, kinds in shapes_of(self.state).items()
        }

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """fp32 [stop - start]: elements [start, stop) of a kind of value in row-major order.

        Reads only what is asked for.
        """
        out = torch.empty(stop - start, dtype=torch.float32)
        offset = filled = 0
        for wanted in boxes(self._shapes[name][kind], start, stop):
            place = out[offset : offset + volume(wanted)].view([b - a for a, b in wanted])
            offset += volume(wanted)
            for file, entry in self._fragments.get((name, kind), []):
                common = intersection(wanted, entry.box)
                if common is not None:
                    place[within(common, wanted)] = self._slice(
                        file, entry.tensor, within(common, entry.box)
                    )
                    filled += volume(common)
                    self._mapped += 4 * volume(common)
        if self._mapped > MOST_MAPPED:
            self.close()
        assert filled == stop - start, (
            f"{name} ({kind}): fragments that tile were checked for when the checkpoint was opened"
        )
        return out

    def close(self) -> None:
        """Let go of the files, which reading opens again: while one is mapped, removing it frees no room on the disk."""
        self._open.clear()
        self._mapped = 0

    def read_whole(self, name: str, kind: str = "weight") -> Tensor:
        """One kind of value of a parameter in its full shape, fp32."""
        shape = self._shapes[name][kind]
        return self.read(name, kind, 0, math.prod(shape)).view(shape)

    def _slice(self, file: str, tensor: str, slices: tuple[slice, ...]) -> Tensor:
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            part = self._open[file].get_slice(tensor)
            return part[slices] if slices else part[:]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"checkpoint {self.folder}: {file} cannot be read: {error}"
            ) from error


def check_shapes(checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError when the checkpoint is of another model.

    The first difference is named.
    """
    stored = checkpoint.shapes()
    for name in sorted(stored.keys() | shapes.keys()):
        if stored.get(name) != shapes.get(name):
            error = CheckpointError(
                f"checkpoint {checkpoint.folder} is of another model: {name} is"
                f" {stored.get(name, 'missing')} there and {shapes.get(name, 'missing')} here; use"
                " its own config or another run.dir"
            )
            error.every_rank = False
            raise error


def check_state_shapes(checkpoint: Checkpoint, shapes: dict[str, dict[str, Shape]]) -> None:
    """Raise CheckpointError when the checkpoint is of another model or of another optimizer.

    The first difference is named.
    """
    check_shapes(checkpoint, {name: kinds["weight"] for name, kinds in shapes.items()})
    stored = checkpoint.state_shapes()
    for name, kinds in shapes.items():
        if stored[name] != kinds:
            error = CheckpointError(
                f"checkpoint {checkpoint.folder} is of another optimizer: the state of {name} is"
                f" {_describe(stored[name])} there and {_describe(kinds)} in this run; use the"
                " optimizer.kind that it was written with, or another run.dir"
            )
            error.every_rank = False
            raise error


def _describe(kinds: dict[str, Shape]) -> str:
    state = [f"{kind} {list(shape)}" for kind, shape in kinds.items() if kind != "weight"]
    return ", ".join(state) or "nothing"
