"""Jobs with a mirror, for tests: start, save, end; damage to the mirror."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nextpt.base.collective import RankGroup
from nextpt.checkpoint.manager import CheckpointManager
from nextpt.checkpoint.mirror.archive import NOTE, Archive
from nextpt.checkpoint.mirror.mirror import Mirror
from nextpt.config import CheckpointSection
from nextpt.events import MirrorEvent
from tests.support.checkpoints import State


class MirroredJob:
    """A job of one rank with a mirror: it starts, saves and ends."""

    def __init__(
        self,
        root: Path,
        uri: str,
        group: RankGroup | None = None,
        may_write: Callable[[], None] = lambda: None,
        accept: Callable[[Path], None] = lambda folder: None,
        run: str = "run",
        **options: Any,
    ) -> None:
        self.root, self.group = root, group or RankGroup.world()
        self.warnings: list[str] = []
        self.events: list[MirrorEvent] = []
        section = CheckpointSection(**{"keep_last": 2} | options)
        self.mirror = Mirror(Archive(uri), root, section, run, may_write, accept)
        self.manager = CheckpointManager(
            root, section, self.group, self.warnings.append, mirror=self.mirror
        )
        self.checkpoint = self.manager.resume()
        if self.group.rank == 0:
            self.mirror.start()

    def save(self, *which: int) -> MirroredJob:
        for step in which:
            self.manager.save(
                State(float(step), self.group.rank, self.group.world_size),
                {"step": step, "config": {}},
                {},
            )
        return self

    def end(self, seconds: float = 300.0) -> list[int]:
        """Wait for uploads and stop; returns the steps that are not mirrored."""
        deadline = time.monotonic() + seconds
        unfinished = self.mirror.finish(lambda: deadline - time.monotonic())
        self.events += self.mirror.drain_events()
        return unfinished

    def steps_with(self, status: str) -> list[int]:
        """Steps of the events with this status."""
        self.events += self.mirror.drain_events()
        return [event.step for event in self.events if event.status == status]

    def wait_for(self, status: str, step: int | None = None) -> None:
        self._wait_until(
            lambda: any(step in (None, uploaded) for uploaded in self.steps_with(status))
        )

    def wait_until_idle(self) -> None:
        """Wait until all is mirrored and the uploading thread waits for the next checkpoint."""
        mirror = self.mirror
        self._wait_until(lambda: mirror._idle.is_set() and not mirror._changed.is_set())

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < deadline, self.events
            time.sleep(0.01)


def valid_steps(uri: str) -> list[int]:
    """Steps of the mirrored checkpoints, newest first; all are valid, and nothing else exists."""
    archive = Archive(uri)
    stored = archive.checkpoints()
    assert [archive.problem(checkpoint) for checkpoint in stored] == [None] * len(stored) and all(
        checkpoint.complete for checkpoint in stored
    )
    names = {
        NOTE,
        *(
            f"{checkpoint.name}/{name}"
            for checkpoint in stored
            for name in [*archive.manifest(checkpoint).files, "manifest.json"]
        ),
    }
    assert set(archive.store.sizes()) <= names
    return [checkpoint.step for checkpoint in stored]


def corrupt(
    uri: str,
    step: int,
    name: str,
    change: Callable[[bytes], bytes] = lambda data: data[:-1] + bytes([data[-1] ^ 1]),
) -> None:
    """Change a file of a mirrored checkpoint."""
    archive = Archive(uri)
    stored = next(checkpoint for checkpoint in archive.checkpoints() if checkpoint.step == step)
    archive.store.write(
        f"{stored.name}/{name}", [change(archive.store.read(f"{stored.name}/{name}"))]
    )
