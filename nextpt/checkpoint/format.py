"""The form of a checkpoint on disk.

    step-000000500/
        rank-00000.safetensors   fp32 fragments; one tensor per box
        rank-00000.json          which parameter, kind, full shape and slice per axis each tensor is; random states
        state.json               step, config, versions, data position, optimizer scalars, parameter shapes
        manifest.json            sizes and hashes of all other files; written last

JSON is canonical (sorted keys), so equal state gives equal bytes. Nothing is pickled. A folder is a checkpoint only if
its manifest verifies.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_prep.files import canonical_json
from nextpt.checkpoint.boxes import boxes, intersection, volume, within
from nextpt.checkpoint.state import ShardedState
from nextpt.errors import CheckpointError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
FILE_NAME = re.compile(r"rank-\d{5}\.(safetensors|json)|state\.json")


def write_json(path: Path, value: Any) -> None:
    """Canonical JSON, synced to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(canonical_json(value))
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Make the bytes of a file, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def describe(path: Path) -> dict[str, Any]:
    """{"size", "xxh3"} of a file, from its bytes on the disk."""
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
            size += len(block)
    return {"size": size, "xxh3": digest.hexdigest()}


def write_rank(folder: Path, rank: int, state: ShardedState, rng: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Write one rank's fragments; returns {file name: description}."""
    tensors: dict[str, Tensor] = {}
    entries = []
    for fragment in state.fragments():
        flat = fragment.tensor.detach().to("cpu", torch.float32)
        offset = 0
        for box in boxes(fragment.shape, fragment.start, fragment.stop):
            key = f"{len(tensors):06d}"
            size = volume(box)
            # A copy: views of one flat buffer share storage, which safetensors refuses.
            tensors[key] = flat[offset : offset + size].reshape([b - a for a, b in box]).clone()
            offset += size
            entries.append({"tensor": key, "name": fragment.name, "kind": fragment.kind, "shape": fragment.shape, "slices": box})
    names = [f"rank-{rank:05d}.safetensors", f"rank-{rank:05d}.json"]
    save_file(tensors, folder / names[0])
    sync(folder / names[0])
    write_json(folder / names[1], {"fragments": entries, "rng": rng})
    return {name: describe(folder / name) for name in names}


def manifest_problem(folder: Path) -> str | None:
    """Why a folder cannot be a checkpoint, by its manifest and file sizes alone; None if it may be one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format_version"] != FORMAT_VERSION:
            return f"its format version is {manifest['format_version']}, this nextpt reads {FORMAT_VERSION}"
        for name, entry in manifest["files"].items():
            if not FILE_NAME.fullmatch(name):
                return f"its manifest names a file that no checkpoint has: {name!r}"
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["size"]:
                return f"{name} has {path.stat().st_size} bytes, expected {entry['size']}"
    except FileNotFoundError:
        return "it has no manifest: it was not finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read: {error}"
    return None


def hash_problem(folder: Path, share: int = 0, shares: int = 1) -> str | None:
    """Why a folder whose manifest is in order is no checkpoint, by the hashes of every `shares`-th file from `share`."""
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    for name in sorted(files)[share::shares]:
        try:
            found = describe(folder / name)
        except OSError as error:
            return f"{name}: {error.strerror or error}"
        if found != files[name]:
            return f"{name} is damaged: its hash differs from the manifest's"
    return None


class Checkpoint:
    """A checkpoint that was verified. `state`: what state.json holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            self._ranks = [json.loads(p.read_text(encoding="utf-8")) for p in self._rank_files()]
        except (OSError, ValueError) as error:
            raise CheckpointError(f"checkpoint {folder} cannot be read: {error}") from error
        self._fragments: dict[tuple[str, str], list[tuple[str, dict[str, Any]]]] = {}
        for path, index in zip(self._rank_files(), self._ranks, strict=True):
            for entry in index["fragments"]:
                key = (entry["name"], entry["kind"])
                self._fragments.setdefault(key, []).append((path.with_suffix(".safetensors").name, entry))
        self._open: dict[str, Any] = {}

    def _rank_files(self) -> list[Path]:
        return [self.folder / f"rank-{rank:05d}.json" for rank in range(self.state["world_size"])]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def rng(self, rank: int) -> dict[str, Any] | None:
        """Random states of a rank; None when the checkpoint was written by fewer."""
        return self._ranks[rank]["rng"] if rank < len(self._ranks) else None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(shape) for name, shape in self.state["parameters"].items()}

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """fp32 [stop - start]: elements [start, stop) of a parameter in row-major order. Reads only what is asked for.

        Raises CheckpointError when the fragments leave a gap or overlap.
        """
        shape = self.shapes()[name]
        out = torch.empty(stop - start, dtype=torch.float32)
        filled = torch.zeros(stop - start, dtype=torch.uint8)
        offset = 0
        for wanted in boxes(shape, start, stop):
            size = volume(wanted)
            sides = [b - a for a, b in wanted]
            place, marks = out[offset : offset + size].view(sides), filled[offset : offset + size].view(sides)
            offset += size
            for file, entry in self._fragments.get((name, kind), []):
                stored = tuple((a, b) for a, b in entry["slices"])
                common = intersection(wanted, stored)
                if common is not None:
                    place[within(common, wanted)] = self._slice(file, entry["tensor"], within(common, stored))
                    marks[within(common, wanted)] += 1
        if not bool((filled == 1).all()):
            raise CheckpointError(f"checkpoint {self.folder}: fragments of {name} ({kind}) leave gaps or overlap")
        return out

    def read_whole(self, name: str, kind: str = "weight") -> Tensor:
        """One parameter in its full shape, fp32."""
        shape = self.shapes()[name]
        return self.read(name, kind, 0, math.prod(shape)).view(shape)

    def _slice(self, file: str, tensor: str, slices: tuple[slice, ...]) -> Tensor:
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            part = self._open[file].get_slice(tensor)
            return part[slices] if slices else part[:]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"checkpoint {self.folder}: {file} cannot be read: {error}") from error
