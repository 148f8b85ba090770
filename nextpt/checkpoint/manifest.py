"""Checkpoint manifest: files with sizes and hashes, step, lineage, and a hash of itself.

The manifest is written last. A folder is a checkpoint only if its manifest is valid and the folder
holds exactly the named files, with these sizes and hashes.
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import xxhash
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from nextpt.base.files import canonical_json
from nextpt.base.json_files import open_regular, parse_json, write_json
from nextpt.checkpoint.errors import DamagedError, UnsupportedVersionError

# Version 1 had no step, lineage, loss and hash of itself. Version 2 named the lineage `line`.
FORMAT_VERSION = 3
MANIFEST = "manifest.json"
STATE = "state.json"
# step-STEP, or step-STEP.ATTEMPT after a rollback; see folders.py.
FOLDER = re.compile(r"step-(\d{9,18})(?:\.(\d{1,9}))?")
# Above any real manifest: 10^5 ranks are 24 MB. What claims to be larger is not read into memory.
LARGEST_MANIFEST = 2**26
Count = Annotated[int, Field(ge=0, lt=2**63)]
Lineage = list[list[int]]  # see Manifest.lineage


class FileEntry(BaseModel):
    """Size of a file in bytes, and its 128-bit xxh3 hash in hex."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    size: Count
    xxh3: str = Field(pattern=r"^[0-9a-f]{32}$")


class Manifest(BaseModel):
    """Content of manifest.json.

    Attributes:
        format_version: Version that wrote it.
        files: Name -> size and hash of every other file.
        step: Number of optimizer steps.
        world_size: Number of ranks that wrote the checkpoint.
        sequence: Number of this save; it grows by one with every save of the run folder. 0 in
            version 1, which had none.
        lineage: Ranges [first, last] of the sequence numbers of all saves that this one descends
            from, and its own. What lies between them was abandoned by a rollback.
        loss: Of the last validation before the save, nats per token.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format_version: Annotated[int, Field(ge=1, le=FORMAT_VERSION)] = FORMAT_VERSION
    files: dict[str, FileEntry]
    step: Count
    world_size: Annotated[int, Field(ge=1, le=10**6)]
    sequence: Count = 0
    lineage: list[Annotated[list[Count], Field(min_length=2, max_length=2)]] = []
    loss: FiniteFloat | None = None

    @property
    def bytes(self) -> int:
        """Size of all files but the manifest."""
        return sum(entry.size for entry in self.files.values())

    def descends_from(self, other: Manifest) -> bool:
        """Whether training went through `other` on its way to this save.

        Of saves without a sequence number, those of a lower or equal step count as ancestors.
        """
        return other.step <= self.step if other.sequence == 0 else other.is_in(self.lineage)

    def is_in(self, lineage: Lineage) -> bool:
        """Whether this save is part of a lineage.

        One without a sequence number is older than all that have one, and counts as part of it.
        """
        return self.sequence == 0 or any(first <= self.sequence <= last for first, last in lineage)


def extend_lineage(lineage: Lineage, sequence: int) -> Lineage:
    """Lineage of a save numbered `sequence` that continues `lineage`."""
    if lineage and lineage[-1][1] == sequence - 1:
        return [*lineage[:-1], [lineage[-1][0], sequence]]
    return [*lineage, [sequence, sequence]]


def file_names(world_size: int) -> set[str]:
    """Names of the files of a checkpoint that `world_size` ranks wrote, without the manifest."""
    return {STATE} | {
        f"rank-{rank:05d}.{kind}" for rank in range(world_size) for kind in ("safetensors", "json")
    }


@dataclass(frozen=True)
class ListedCheckpoint:
    """A folder with a valid manifest; its other files were not read."""

    folder: Path
    manifest: Manifest


def lineage_of(checkpoints: Sequence[ListedCheckpoint]) -> list[ListedCheckpoint]:
    """The first checkpoint and those of the others that it continues, in the same order."""
    return [c for c in checkpoints if checkpoints[0].manifest.descends_from(c.manifest)]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json durably, with the hash of itself."""
    value = manifest.model_dump()
    write_json(folder / MANIFEST, value | {"xxh3": _digest(value)})


def _digest(value: dict[str, Any]) -> str:
    return xxhash.xxh3_128(canonical_json(value).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and validate manifest.json; the files that it names are not read.

    Raises:
        DamagedError: It is missing, cannot be read, or is not what nextpt writes.
        UnsupportedVersionError: It is of a newer format version.
    """
    try:
        value = _canonical(folder)
        version = value.get("format_version") if isinstance(value, dict) else None
        version = version if type(version) is int else None  # a bool is an int, and true equals 1
        if version is not None and version > FORMAT_VERSION:
            raise UnsupportedVersionError(
                f"its format version is {version}, this nextpt reads up to {FORMAT_VERSION}; use a"
                " newer one"
            )
        if version == 1:
            manifest = _first_version(folder, value)
        else:
            digest = value.pop("xxh3", None) if isinstance(value, dict) else None
            manifest = Manifest.model_validate(_second_version(value) if version == 2 else value)
            if digest != _digest(value):
                raise DamagedError(
                    "its manifest is damaged: it does not have the hash that it gives for itself"
                )
    except FileNotFoundError:
        raise DamagedError("it has no manifest: it was not finished, or lost it") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise DamagedError(
            f"its manifest is not in order: {'.'.join(map(repr, first['loc']))}: {first['msg']}"
        ) from None
    except (OSError, ValueError) as error:
        raise DamagedError(f"its manifest cannot be read: {error}") from None
    _check_names(folder, manifest)
    return manifest


def _canonical(folder: Path) -> Any:
    with open_regular(folder / MANIFEST) as file:
        data = file.read(LARGEST_MANIFEST + 1)
    if len(data) > LARGEST_MANIFEST:
        raise ValueError("it is larger than any manifest")
    value = parse_json(data)
    if canonical_json(value).encode() != data:
        raise ValueError("it is not written as nextpt writes it")
    return value


def _first_version(folder: Path, value: dict[str, Any]) -> Manifest:
    files = value.pop("files", None)
    if value != {"format_version": 1} or not isinstance(files, dict):
        raise ValueError("version 1 has only files and format_version")
    match = FOLDER.fullmatch(folder.name)
    return Manifest.model_validate(
        {
            "format_version": 1,
            "files": files,
            "step": int(match[1]) if match else 0,
            "world_size": max(1, (len(files) - 1) // 2),
        }
    )


def _second_version(value: dict[str, Any]) -> dict[str, Any]:
    if "lineage" in value:
        raise ValueError("version 2 has no key 'lineage'")
    return {"lineage" if key == "line" else key: item for key, item in value.items()}


def _check_names(folder: Path, manifest: Manifest) -> None:
    match = FOLDER.fullmatch(folder.name)
    if match and int(match[1]) != manifest.step:
        raise DamagedError(f"its manifest is of step {manifest.step}")
    expected = file_names(manifest.world_size)
    for name in sorted(manifest.files.keys() ^ expected):
        if name in expected:
            raise DamagedError(f"its manifest does not name {name}")
        raise DamagedError(
            f"its manifest names a file that no checkpoint of {manifest.world_size} ranks has:"
            f" {name!r}"
        )


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compare the names and sizes of a folder's files with its manifest. Raises DamagedError."""
    try:
        if folder.is_symlink():
            raise DamagedError("it is a symbolic link")
        stats = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(folder)}
    except OSError as error:
        raise DamagedError(f"it cannot be read: {error.strerror or error}") from None
    for name, entry in manifest.files.items():
        if name not in stats:
            raise DamagedError(f"{name} is missing")
        if not stat.S_ISREG(stats[name].st_mode):
            raise DamagedError(f"{name} is a symbolic link or no plain file")
        if stats[name].st_size != entry.size:
            raise DamagedError(f"{name} has {stats[name].st_size} bytes, expected {entry.size}")
    for name in sorted(stats.keys() - manifest.files.keys() - {MANIFEST}):
        raise DamagedError(f"it holds {name!r}, which its manifest does not name")


def manifest_problem(folder: Path) -> str | None:
    """First problem in the manifest of a folder, or in the sizes of its files; None without one."""
    try:
        check_files(folder, read_manifest(folder))
    except (DamagedError, UnsupportedVersionError) as problem:
        return str(problem)
    return None


def describe(path: Path) -> dict[str, Any]:
    """Size and hash of a file, from its bytes on the disk, as in `FileEntry`."""
    digest, size = xxhash.xxh3_128(), 0
    with open_regular(path) as file:
        assert isinstance(file, io.BufferedReader)
        # In large blocks: between two of them the writing thread must get the GIL back from the one
        # that trains.
        buffer = memoryview(bytearray(max(1, min(os.fstat(file.fileno()).st_size, 2**24))))
        while read := file.readinto(buffer):
            digest.update(buffer[:read])
            size += read
    return {"size": size, "xxh3": digest.hexdigest()}


def hash_problem(folder: Path, manifest: Manifest, share: int, shares: int) -> str | None:
    """First file whose hash differs from the manifest's; None without one.

    Args:
        folder: The checkpoint.
        manifest: Its manifest.
        share: Number of this reader, from 0.
        shares: Number of readers; each takes every `shares`-th file.

    Returns:
        The file and what is wrong with it.
    """
    for name in sorted(manifest.files)[share::shares]:
        try:
            described = describe(folder / name)
        except OSError as error:
            return f"{name}: {error.strerror or error}"
        if described != manifest.files[name].model_dump():
            return f"{name} is damaged: its hash differs from the manifest's"
    return None
