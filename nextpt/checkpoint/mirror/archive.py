"""Checkpoints in an object store: names, upload, verification, download, removal.

    URI/mirror.json                                   the run, and the job that writes here now
    URI/000000012-step-000000500-3fa9c1d2e4b5a697/    sequence number, step, first half of the
                                                      manifest's hash
        rank-00000.safetensors, rank-00000.json, state.json   as in the run's folder
        manifest.json                                 written last, after the others were read back

A store cannot rename. So a folder without manifest.json is not a checkpoint, and the name holds a
hash of the content: what lies under it is part of this checkpoint or damaged, never part of
another, and uploading it twice does no harm.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from nextpt.base.files import canonical_json
from nextpt.base.json_files import open_regular
from nextpt.base.stores import BLOCK, StoreFolder
from nextpt.checkpoint.errors import DamagedError
from nextpt.checkpoint.manifest import (
    LARGEST_MANIFEST,
    MANIFEST,
    FileEntry,
    Manifest,
    read_manifest,
)

NOTE = "mirror.json"
NAME = re.compile(r"(\d{9,19})-(step-(\d{9,18}))-([0-9a-f]{16})")


def _proceed() -> None:
    """Default of callbacks that may raise to interrupt a transfer."""


@dataclass(frozen=True)
class ArchivedCheckpoint:
    """A checkpoint in the store, known by its name; its files were not read.

    Attributes:
        name: Name of its folder.
        complete: It has a manifest.
    """

    name: str
    complete: bool

    @property
    def sequence(self) -> int:
        """Sequence number; see `Manifest`."""
        return int(_parse(self.name)[1])

    @property
    def step(self) -> int:
        """Number of optimizer steps."""
        return int(_parse(self.name)[3])


def _parse(name: str) -> re.Match[str]:
    match = NAME.fullmatch(name)
    assert match is not None, f"{name} is not the name of an archived checkpoint"
    return match


def name_in_store(folder: Path, manifest: Manifest) -> str:
    """Name of a local checkpoint in the store. Raises OSError."""
    with open_regular(folder / MANIFEST) as file:
        return f"{manifest.sequence:09d}-step-{manifest.step:09d}-{_short_digest(file.read())}"


def _short_digest(manifest: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(manifest)[:16]


class Archive:
    """Checkpoints of one run in an object store or a folder. For one thread at a time.

    Methods raise what the store's client raises (`stores.STORE_ERRORS`).

    Args:
        location: A URI, such as s3://BUCKET/RUN, or a folder.

    Raises:
        StoreError: The URI is not valid.
    """

    def __init__(self, location: str | Path) -> None:
        self.store = StoreFolder(location, durable=True, background=False)
        self.uri = str(location).rstrip("/")
        self._manifests: dict[str, Manifest] = {}

    def read_note(self) -> dict[str, Any] | None:
        """Run, job and host that write here, as `claim` wrote them; None where nobody has."""
        data = self.store.read(NOTE)
        return None if data is None else dict(json.loads(data))

    def claim(self, run: str, owner: str, host: str) -> None:
        """Record that this job writes here now. Shows whether the store can be written."""
        note = canonical_json({"host": host, "owner": owner, "run": run})
        self.store.write(NOTE, [note.encode()])

    def checkpoints(self) -> list[ArchivedCheckpoint]:
        """All checkpoints, newest first, also incomplete ones."""
        files = self.store.sizes()
        names = {name.partition("/")[0] for name in files}
        checkpoints = [
            ArchivedCheckpoint(name, f"{name}/{MANIFEST}" in files)
            for name in names
            if NAME.fullmatch(name)
        ]
        return sorted(checkpoints, key=lambda c: (c.sequence, c.step, c.name), reverse=True)

    def manifest(self, checkpoint: ArchivedCheckpoint) -> Manifest:
        """Read the manifest of a checkpoint, validated in itself and against the name.

        Raises:
            DamagedError: It is missing or not valid.
            UnsupportedVersionError: It is of a newer format version.
        """
        if checkpoint.name not in self._manifests:
            data = self.store.read(f"{checkpoint.name}/{MANIFEST}", LARGEST_MANIFEST + 1)
            if data is None:
                raise DamagedError("it has no manifest: it was not finished, or lost it")
            self._manifests[checkpoint.name] = self._parse_manifest(checkpoint, data)
        return self._manifests[checkpoint.name]

    def _parse_manifest(self, checkpoint: ArchivedCheckpoint, data: bytes) -> Manifest:
        match = _parse(checkpoint.name)
        if _short_digest(data) != match[4]:
            raise DamagedError(
                "its manifest is damaged: it does not have the hash that its name gives"
            )
        with tempfile.TemporaryDirectory(prefix="nextpt-manifest-") as folder:
            path = Path(folder, match[2])
            path.mkdir()
            (path / MANIFEST).write_bytes(data)
            manifest = read_manifest(path)
        if manifest.sequence != checkpoint.sequence:
            raise DamagedError(f"its manifest has the sequence number {manifest.sequence}")
        return manifest

    def problem(
        self, checkpoint: ArchivedCheckpoint, on_block: Callable[[], None] = _proceed
    ) -> str | None:
        """Read all files of a checkpoint and compare them with its manifest.

        Args:
            checkpoint: Which one.
            on_block: Called between blocks; may raise to interrupt.

        Returns:
            The first difference, found twice; None for a valid checkpoint.

        Raises:
            UnsupportedVersionError: It is of a newer format version.
        """
        try:
            manifest = self.manifest(checkpoint)
        except DamagedError as problem:
            return str(problem)
        sizes = self.store.sizes(checkpoint.name)
        for name, entry in sorted(manifest.files.items()):
            path = f"{checkpoint.name}/{name}"
            if path not in sizes:
                return f"{name} is missing"
            if sizes[path] != entry.size:
                return f"{name} has {sizes[path]} bytes, expected {entry.size}"
            # Twice: an answer that is cut short need not look like an error.
            if not any(self._holds(path, entry, on_block) for _ in range(2)):
                return f"{name} is damaged: its hash differs from the manifest's"
        return None

    def _holds(self, path: str, expected: FileEntry, on_block: Callable[[], None]) -> bool:
        """Whether a file of the store has the expected size and hash."""
        digest, size = xxhash.xxh3_128(), 0
        for block in self.store.blocks(path, expected.size + 1):
            on_block()
            digest.update(block)
            size += len(block)
        return expected == FileEntry(size=size, xxh3=digest.hexdigest())

    def upload(
        self,
        folder: Path,
        manifest: Manifest,
        may_commit: Callable[[], None] = _proceed,
        on_block: Callable[[], None] = _proceed,
    ) -> ArchivedCheckpoint:
        """Upload a local checkpoint and read it back; files that are there already are only read.

        Args:
            folder: The local checkpoint.
            manifest: Its manifest.
            may_commit: Called before the manifest makes it a checkpoint; raises to refuse.
            on_block: Called between blocks; may raise to interrupt.

        Raises:
            DamagedError: A local file is not what the manifest says.
            OSError: The store does not return what it was sent.
        """
        checkpoint = ArchivedCheckpoint(name_in_store(folder, manifest), True)
        sizes = self.store.sizes(checkpoint.name)
        for name, entry in sorted(manifest.files.items()):
            path = f"{checkpoint.name}/{name}"
            if sizes.get(path) == entry.size and self._holds(path, entry, on_block):
                continue
            self.store.write(path, _read_blocks(folder / name, entry, on_block))
            if not self._holds(path, entry, on_block):
                raise OSError(f"{self.uri}/{path} does not hold what was sent")
        may_commit()
        path, data = f"{checkpoint.name}/{MANIFEST}", (folder / MANIFEST).read_bytes()
        if self.store.read(path) != data:
            self.store.write(path, [data])
            if self.store.read(path) != data:
                raise OSError(f"{self.uri}/{path} does not hold what was sent")
        return checkpoint

    def download(self, checkpoint: ArchivedCheckpoint, name: str, target: Path) -> None:
        """Download one file durably: the manifest, or one that it names.

        Raises:
            DamagedError: The file is not what the manifest says.
        """
        manifest = self.manifest(checkpoint)
        expected = None if name == MANIFEST else manifest.files[name]
        limit = LARGEST_MANIFEST if expected is None else expected.size + 1
        digest, size = xxhash.xxh3_128(), 0
        with open(target, "wb") as file:
            for block in self.store.blocks(f"{checkpoint.name}/{name}", limit):
                digest.update(block)
                size += len(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        if expected and expected != FileEntry(size=size, xxh3=digest.hexdigest()):
            raise DamagedError(
                f"{name} is damaged: its hash differs from the manifest's"
                if size == expected.size
                else f"{name} has {size} bytes, expected {expected.size}"
            )

    def remove(self, checkpoint: ArchivedCheckpoint) -> None:
        """Remove a checkpoint: its manifest first, so that a part is never taken for a whole."""
        if checkpoint.complete:
            self.store.remove(f"{checkpoint.name}/{MANIFEST}")
        self.store.remove_folder(checkpoint.name)
        self._manifests.pop(checkpoint.name, None)


def _read_blocks(path: Path, expected: FileEntry, on_block: Callable[[], None]) -> Iterator[bytes]:
    """Blocks of a local file; raises DamagedError at its end where they are not as expected."""
    digest, size = xxhash.xxh3_128(), 0
    with open_regular(path) as file:
        while block := file.read(BLOCK):
            on_block()
            digest.update(block)
            size += len(block)
            yield block
    if expected != FileEntry(size=size, xxh3=digest.hexdigest()):
        raise DamagedError(f"{path.name} is not what its manifest says")
