"""The checkpoints of one run, as its training sees them: start from one, add to them, let old ones go."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from nextpt.checkpoint.commit import Saved, choose, commit, intact, on_first, out_of_the_way, snapshot_together
from nextpt.checkpoint.folders import clear_leftovers, listing, remove
from nextpt.checkpoint.format import Checkpoint, Snapshot
from nextpt.checkpoint.manifest import read_manifest
from nextpt.checkpoint.ranks import Ranks
from nextpt.checkpoint.retention import kept
from nextpt.checkpoint.state import ShardedState
from nextpt.config import CheckpointSection

# Nothing is removed unless so many of those that stay have just been read and their hashes agree.
VERIFIED = 2


@dataclass(frozen=True)
class Finished:
    """A save that became durable. seconds: from its begin till then. stall_seconds: those of them in which training stood still."""

    saved: Saved
    seconds: float
    stall_seconds: float


class Keeper:
    """warn: shows a line to the person; rank 0's is the one to listen to. may_commit: see `save` of commit.py. All methods
    are collective.

    With checkpoint.asynchronous a thread writes, one save at a time. It has a process group of its own, because two
    threads of a rank must not take turns in one. What it finds is agreed upon and told by the thread of the training.
    """

    def __init__(self, root: Path, settings: CheckpointSection, ranks: Ranks, warn: Callable[[str], None],
                 may_commit: Callable[[], None] = lambda: None) -> None:
        self.root, self.settings, self.ranks, self.warn, self.may_commit = root, settings, ranks, warn, may_commit
        self._line: list[list[int]] = []
        self._writers = ranks.another() if settings.asynchronous else ranks
        self._flight: Future[tuple[Saved, float, list[str]]] | None = None
        self._begun = self._stall = 0.0

    def start(self) -> Checkpoint | None:
        """What to resume from; see `choose`. Saves will continue its line. Leftovers of killed saves are removed.

        So after a job that was killed in its last save they do not stay for ever; the next save would come too late.
        """
        on_first(lambda: clear_leftovers(self.root), self.root, self.ranks)
        found = choose(self.root, self.settings.resume, self.ranks, self.warn, mend=True)
        if found is not None:
            self._line = read_manifest(found.folder).line
        return found

    def save(self, state: ShardedState, extras: dict[str, Any], rng: dict[str, Any], loss: float | None = None,
             wait: bool = True) -> list[Finished]:
        """Save extras["step"]; see `save` of commit.py, also for what it raises. Returns what became durable.

        wait: until it is durable, and those are removed that need not be kept. Otherwise, with checkpoint.asynchronous,
        only until the state is copied, and `poll` tells the rest. A save that is still under way is waited for first.
        """
        begun = time.monotonic()
        finished = self._settle() if self._flight else []
        snapshot = snapshot_together(self.root, state, extras, rng, self.ranks)
        flight = self._flight = Future()
        self._begun = begun
        if self.settings.asynchronous and not wait:
            Thread(target=self._write, args=(flight, snapshot, loss), name="checkpoint", daemon=True).start()
            self._stall = time.monotonic() - begun
            return finished
        self._write(flight, snapshot, loss)
        self._stall = time.monotonic() - begun
        return finished + self._settle()

    def poll(self, wait: bool = False) -> list[Finished]:
        """Whether the save under way became durable on all ranks. Costs nothing when there is none. Raises what the save raised.

        wait: until it is.
        """
        if self._flight is None or not wait and self.ranks.any(not self._flight.done()):
            return []
        return self._settle()

    def _settle(self) -> list[Finished]:
        """Wait for the save under way; raises what it raised, which is the same on all ranks."""
        flight, self._flight = self._flight, None
        saved, durable, warnings = flight.result()
        for text in warnings:
            self.warn(text)
        self._line = saved.line
        return [Finished(saved, durable - self._begun, self._stall)]

    def _write(self, flight: Future, snapshot: Snapshot, loss: float | None) -> None:
        """Commit, then let go of what need not be kept; the future gets the result."""
        try:
            saved = commit(self.root, snapshot, self._writers, self._line, loss, self.may_commit)
            durable = time.monotonic()
            flight.set_result((saved, durable, self._retire()))
        except BaseException as error:  # it is raised where the result is asked for; without one that would wait for ever
            flight.set_exception(error)

    def _retire(self) -> list[str]:
        """Remove what retention does not keep, if at least two of the others prove whole. Returns what to warn of.

        The newest was read when it was hashed, a moment ago.
        """
        names, surplus = on_first(self._plan, self.root, self._writers)
        if not surplus:
            return []
        whole, warnings = names[:1], []
        for name in [*names[1:], *surplus]:
            if len(whole) == VERIFIED:
                break
            problem = intact(self.root / name, self._writers)
            if problem is None:
                whole.append(name)
            else:
                how = on_first(lambda name=name: out_of_the_way(self.root / name), self.root, self._writers)
                warnings.append(f"warning: checkpoint {self.root / name} is not usable: {problem}{how}")
                surplus = [other for other in surplus if other != name]
        if len(whole) == VERIFIED:
            warnings += on_first(lambda: self._remove([name for name in surplus if name not in whole]), self.root, self._writers)
        return warnings

    def _plan(self) -> tuple[list[str], list[str]]:
        """Names of (those to keep, those to let go), newest first."""
        listed = listing(self.root)[0]
        keep = [one.folder.name for one in kept(listed, self.settings.keep_last, self.settings.keep_every, self.settings.keep_best)]
        return keep, [one.folder.name for one in listed if one.folder.name not in keep]

    def _remove(self, names: list[str]) -> list[str]:
        warnings = []
        for name in reversed(names):  # the oldest first
            try:
                remove(self.root / name)
            except OSError as error:  # training need not end for it; the next save tries again
                warnings.append(f"warning: checkpoint {self.root / name} is no longer needed and cannot be removed: {error.strerror}")
        return warnings
