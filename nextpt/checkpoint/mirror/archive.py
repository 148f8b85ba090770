"""Checkpoints in an object store: their names there, and how one gets there, is looked at, comes back and goes.

    PLACE/mirror.json                                        the run, and the job that writes here
    now PLACE/000000012-step-000000500-3fa9c1d2e4b5a697/         sequence number, step, hash of its
    manifest (first half)
        rank-00000.safetensors, rank-00000.json, state.json  as in the run's folder
        manifest.json                                        written last, when the others were read
        back and agreed

A store has no renaming. So a folder without manifest.json is no checkpoint, and the name holds a
hash of the content: what lies under it is a part of this checkpoint or damaged, never one of
another, and sending it twice does no harm.
"""

from __future__ import annotations

import json
import os
import random
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from nextpt.base.errors import UserError
from nextpt.base.files import canonical_json
from nextpt.base.json_files import open_regular
from nextpt.base.stores import BLOCK, StoreFolder, is_refusal
from nextpt.checkpoint.manifest import (
    LARGEST_MANIFEST,
    MANIFEST,
    DamagedError,
    Manifest,
    UnsupportedVersionError,
    read_manifest,
)

T = TypeVar("T")
NOTE = "mirror.json"
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds
ATTEMPTS = 5  # of a start, which a person may wait for
# Seconds without an answer or a block; no client that pyarrow has gives up on a connection that
# hangs (Linux). A part of S3 is 10 MiB, so a link of 1 Mbit/s passes.
STALL = 120.0
_CHANCE = random.Random()  # not the process's own: training's random state is part of a checkpoint
NAME = re.compile(r"(\d{9,19})-(step-(\d{9,18}))-([0-9a-f]{16})")


@dataclass(frozen=True)
class ArchivedCheckpoint:
    """A checkpoint in the store, by its name. complete: it has a manifest.

    Its files were not looked at.
    """

    name: str
    complete: bool

    @property
    def sequence(self) -> int:
        return int(NAME.fullmatch(self.name)[1])

    @property
    def step(self) -> int:
        return int(NAME.fullmatch(self.name)[3])


def name_in_store(folder: Path, manifest: Manifest) -> str:
    """The name that a checkpoint of the run's folder has in a store. Raises OSError."""
    with open_regular(folder / MANIFEST) as file:
        return f"{manifest.sequence:09d}-step-{manifest.step:09d}-{_digest_of_name(file.read())}"


def _digest_of_name(manifest: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(manifest)[:16]


def pause(failures: int) -> float:
    """Seconds to wait after so many failures in a row: doubled each time, and up to half of it left out by chance."""
    return min(FIRST_PAUSE * 2 ** min(failures - 1, 30), LONGEST_PAUSE) * _CHANCE.uniform(0.5, 1.0)


def in_time(
    action: Callable[[], T],
    progress: Callable[[], int] = lambda: 0,
    ended: Callable[[], bool] = lambda: False,
) -> T:
    """What `action` returns, in a thread of its own.

    Raises TimeoutError after STALL seconds in which `progress` did not change, and CancelledError
    when `ended`; the thread is left to itself then.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(action())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="store", daemon=True).start()
    seen, at = progress(), time.monotonic()
    while not outcome.done():
        if ended():
            raise CancelledError
        if (now := progress()) != seen:
            seen, at = now, time.monotonic()
        if time.monotonic() - at > STALL:
            raise TimeoutError(f"the store cannot be reached: no answer in {STALL:g} s")
        wait([outcome], min(STALL, 0.2))
    return outcome.result()


def patiently(action: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
    """What `action` returns, tried again with growing pauses; not when the store refuses.

    What is damaged is read twice.

    progress: see `in_time`.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return in_time(action, progress)
        except Exception as error:
            final = isinstance(error, (UserError, UnsupportedVersionError, TimeoutError)) or (
                isinstance(error, DamagedError) and attempt > 1
            )
            if final or attempt == ATTEMPTS or is_refusal(error):
                raise
            time.sleep(pause(attempt))
    raise AssertionError("unreachable")


class Archive:
    """The checkpoints of one run at `place`, an address or a folder.

    Methods raise what the store's client raises.

    Raises StoreError when the address is none. Not for two threads at a time.
    """

    def __init__(self, place: str | Path) -> None:
        self.store = StoreFolder(place, durable=True, background=False)
        self.place = self.store.place
        self._manifests: dict[str, Manifest] = {}

    def note(self) -> dict[str, Any] | None:
        """Whose the mirror is, as `claim` wrote it; None where nobody has."""
        data = self.store.read(NOTE)
        return None if data is None else json.loads(data)

    def claim(self, run: str, owner: str, host: str) -> None:
        """Say that this job writes here now. Shows whether the store can be written."""
        self.store.write(
            NOTE, [canonical_json({"host": host, "owner": owner, "run": run}).encode()]
        )

    def checkpoints(self) -> list[ArchivedCheckpoint]:
        """All that is there, newest first, also what has no manifest."""
        files = self.store.sizes()
        names = {name.partition("/")[0] for name in files}
        found = [
            ArchivedCheckpoint(name, f"{name}/{MANIFEST}" in files)
            for name in names
            if NAME.fullmatch(name)
        ]
        return sorted(found, key=lambda one: (one.sequence, one.step, one.name), reverse=True)

    def manifest(self, stored: ArchivedCheckpoint) -> Manifest:
        """Its manifest, checked in itself and against the name. Raises DamagedError, or UnsupportedVersionError."""
        if stored.name not in self._manifests:
            data = self.store.read(f"{stored.name}/{MANIFEST}", LARGEST_MANIFEST + 1)
            if data is None:
                raise DamagedError("it has no manifest: it was not finished, or lost it")
            self._manifests[stored.name] = self._parse(stored, data)
        return self._manifests[stored.name]

    def _parse(self, stored: ArchivedCheckpoint, data: bytes) -> Manifest:
        if _digest_of_name(data) != NAME.fullmatch(stored.name)[4]:
            raise DamagedError(
                "its manifest is damaged: it does not have the hash that its name gives"
            )
        with tempfile.TemporaryDirectory(prefix="nextpt-manifest-") as folder:
            path = Path(folder, NAME.fullmatch(stored.name)[2])
            path.mkdir()
            (path / MANIFEST).write_bytes(data)
            manifest = read_manifest(path)
        if manifest.sequence != stored.sequence:
            raise DamagedError(f"its manifest has the sequence number {manifest.sequence}")
        return manifest

    def problem(
        self, stored: ArchivedCheckpoint, going_on: Callable[[], None] = lambda: None
    ) -> str | None:
        """Read all of it back: the first difference from its manifest, found twice.

        None when it is whole.

        going_on: called between blocks; may raise to end it. Raises UnsupportedVersionError.
        """
        try:
            manifest = self.manifest(stored)
        except DamagedError as problem:
            return str(problem)
        sizes = self.store.sizes(stored.name)
        for name, entry in sorted(manifest.files.items()):
            path = f"{stored.name}/{name}"
            if path not in sizes:
                return f"{name} is missing"
            if sizes[path] != entry.size:
                return f"{name} has {sizes[path]} bytes, expected {entry.size}"
            # Twice, for an answer that is cut short need not look like an error.
            if not any(self._holds(path, entry.model_dump(), going_on) for _ in range(2)):
                return f"{name} is damaged: its hash differs from the manifest's"
        return None

    def _holds(self, path: str, expected: dict[str, Any], going_on: Callable[[], None]) -> bool:
        digest, size = xxhash.xxh3_128(), 0
        for block in self.store.blocks(path, expected["size"] + 1):
            going_on()
            digest.update(block)
            size += len(block)
        return expected == {"size": size, "xxh3": digest.hexdigest()}

    def send(
        self,
        folder: Path,
        manifest: Manifest,
        may_finish: Callable[[], None] = lambda: None,
        going_on: Callable[[], None] = lambda: None,
    ) -> ArchivedCheckpoint:
        """Bring a checkpoint there and read it back; what is there already of it is only read.

        may_finish: asked before the manifest makes it a checkpoint; raises to refuse. going_on:
        called between blocks; may raise to end it. Raises DamagedError when a local file is not what the
        manifest says, OSError when the store does not give back what it was sent.
        """
        stored = ArchivedCheckpoint(name_in_store(folder, manifest), True)
        sizes = self.store.sizes(stored.name)
        for name, entry in sorted(manifest.files.items()):
            path, expected = f"{stored.name}/{name}", entry.model_dump()
            if sizes.get(path) == entry.size and self._holds(path, expected, going_on):
                continue
            self.store.write(path, _read(folder / name, expected, going_on))
            if not self._holds(path, expected, going_on):
                raise OSError(f"{self.place}/{path} does not hold what was sent")
        may_finish()
        path, data = f"{stored.name}/{MANIFEST}", (folder / MANIFEST).read_bytes()
        if self.store.read(path) != data:
            self.store.write(path, [data])
            if self.store.read(path) != data:
                raise OSError(f"{self.place}/{path} does not hold what was sent")
        return stored

    def fetch(self, stored: ArchivedCheckpoint, name: str, target: Path) -> None:
        """Copy one file, the manifest or one that it names, durably.

        Raises DamagedError when it is not what the manifest says.
        """
        manifest = self.manifest(stored)
        expected = None if name == MANIFEST else manifest.files[name].model_dump()
        digest, size = xxhash.xxh3_128(), 0
        with open(target, "wb") as file:
            for block in self.store.blocks(
                f"{stored.name}/{name}", expected["size"] + 1 if expected else LARGEST_MANIFEST
            ):
                digest.update(block)
                size += len(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        if expected and {"size": size, "xxh3": digest.hexdigest()} != expected:
            raise DamagedError(
                f"{name} is damaged: its hash differs from the manifest's"
                if size == expected["size"]
                else f"{name} has {size} bytes, expected {expected['size']}"
            )

    def remove(self, stored: ArchivedCheckpoint) -> None:
        """Take one away: the manifest first, so that a half is never taken for a whole."""
        if stored.complete:
            self.store.remove(f"{stored.name}/{MANIFEST}")
        self.store.remove_folder(stored.name)
        self._manifests.pop(stored.name, None)


def _read(path: Path, expected: dict[str, Any], going_on: Callable[[], None]) -> Iterator[bytes]:
    """The bytes of a local file. Raises DamagedError at its end when they are not the expected ones."""
    digest, size = xxhash.xxh3_128(), 0
    with open_regular(path) as file:
        while block := file.read(BLOCK):
            going_on()
            digest.update(block)
            size += len(block)
            yield block
    if expected != {"size": size, "xxh3": digest.hexdigest()}:
        raise DamagedError(f"{path.name} is not what its manifest says")
