"""The checkpoints of one run, as its training sees them: start from one, add to them, let old ones go."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from nextpt.base.collective import RankGroup, run_on_rank_0
from nextpt.base.errors import (
    CheckpointError,
    CheckpointSaveError,
    NoValidCheckpointError,
    UserError,
)
from nextpt.checkpoint.commit import (
    CommittedCheckpoint,
    commit,
    intact,
    out_of_the_way,
    same_everywhere,
    select_checkpoint,
    select_earlier_checkpoint,
    snapshot_together,
)
from nextpt.checkpoint.folders import clear_leftovers, list_checkpoints, remove, steps
from nextpt.checkpoint.format import Checkpoint, Snapshot
from nextpt.checkpoint.manifest import read_manifest
from nextpt.checkpoint.mirror.archive import ArchivedCheckpoint
from nextpt.checkpoint.mirror.mirror import Mirror
from nextpt.checkpoint.mirror.restore import fetch
from nextpt.checkpoint.retention import VERIFIED, retained
from nextpt.checkpoint.state import ShardedState
from nextpt.config import CheckpointSection


@dataclass(frozen=True)
class SavedCheckpoint:
    """A save that became durable. seconds: from its begin till then. stall_seconds: those of them in which training stood still."""

    checkpoint: CommittedCheckpoint
    seconds: float
    stall_seconds: float


@dataclass(frozen=True)
class FailedSave:
    """A save of which nothing is left, for the disk did not take it. consecutive: such saves in a row up to this one."""

    step: int
    error: CheckpointSaveError
    consecutive: int


class CheckpointManager:
    """warn: shows a line to the person.

    Rank 0's is the one to listen to. may_commit: see `save` of commit.py. All methods are
    collective.

    With checkpoint.asynchronous a thread writes, one save at a time. It has a process group of its
    own, because two threads of a rank must not take turns in one. What it finds is agreed upon and
    told by the thread of the training.
    """

    def __init__(
        self,
        root: Path,
        settings: CheckpointSection,
        ranks: RankGroup,
        warn: Callable[[str], None],
        may_commit: Callable[[], None] = lambda: None,
        mirror: Mirror | None = None,
    ) -> None:
        self.root = root
        self.settings = settings
        self.ranks = ranks
        self.warn = warn
        self.may_commit = may_commit
        self.mirror = mirror
        self._above = 0  # sequence numbers that the mirror has
        self._lineage: list[list[int]] = []
        self._writers = ranks.duplicate() if settings.asynchronous else ranks
        self._flight: Future[tuple[CommittedCheckpoint, float, list[str]]] | None = None
        self._step = self._failures = 0
        self._begun = self._stall = 0.0

    def resume(self) -> Checkpoint | None:
        """What to resume from; see `choose`, and `_come_back` with a mirror.

        Saves will continue its line. Leftovers of killed saves are removed: after a job that was
        killed in its last save they would stay for ever.
        """
        run_on_rank_0(self.ranks, lambda: clear_leftovers(self.root))
        found = self._come_back() if self.mirror else self._choose()
        if found is not None:
            self._lineage = read_manifest(found.folder).lineage
        return found

    def rollback(self, step: int) -> Checkpoint | None:
        """The newest checkpoint of this line from before `step`, verified; None when there is none.

        Saves will continue from it. No save may be under way.
        """
        assert self._flight is None
        found = select_earlier_checkpoint(self.root, step, self._lineage, self.ranks, self.warn)
        if found is not None:
            self._lineage = read_manifest(found.folder).lineage
        return found

    def _choose(self) -> Checkpoint | None:
        return select_checkpoint(self.root, self.settings.resume, self.ranks, self.warn, mend=True)

    def _come_back(self) -> Checkpoint | None:
        """As `choose`, where what the mirror has counts too: the highest sequence number wins, the folder's own of equal ones.

        Raises NoValidCheckpointError where there are checkpoints, here or there, and none is whole.
        """
        there = self._look_there()
        found = problem = None
        resume = self.settings.resume
        if resume in ("auto", "never") or resume in run_on_rank_0(
            self.ranks, lambda: steps(self.root)
        ):
            try:
                found = self._choose()
            except NoValidCheckpointError as error:
                problem = error
        newest = -1 if found is None else read_manifest(found.folder).sequence
        wanted = [
            one
            for one in there
            if (one.sequence > newest if resume == "auto" else found is None and one.step == resume)
        ]
        for one in wanted:
            why = fetch(
                self.mirror.archive, one, self.root, self.ranks, self.mirror.accept, self.may_commit
            )
            if why is None:
                self.warn(f"step {one.step} fetched from the mirror {self.mirror.archive.place}")
                return self._choose()
            self.warn(
                f"warning: checkpoint {self.mirror.archive.place}/{one.name} is not usable: {why};"
                " the one before it is looked for"
            )
        if found is None and (problem or wanted):
            raise problem or same_everywhere(
                f"the mirror {self.mirror.archive.place} has checkpoints of this run and none that"
                " is whole; look at them, or give another run.dir and checkpoint.mirror",
                NoValidCheckpointError,
            )
        return self._choose() if found is None else found

    def _look_there(self) -> list[ArchivedCheckpoint]:
        """Checkpoints of the mirror, newest first.

        Raises CheckpointError where there are some and none is wanted.
        """

        def look() -> list[list]:
            there = self.mirror.look(bool(steps(self.root)), self.warn)
            if self.settings.resume == "never" and any(one.complete for one in there):
                raise CheckpointError(
                    f"checkpoint.resume = never, but the mirror {self.mirror.archive.place} holds"
                    " checkpoints of this run; give another one or remove them"
                )
            return [[one.name, one.complete] for one in there]

        there = [ArchivedCheckpoint(*one) for one in run_on_rank_0(self.ranks, look)]
        self._above = max((one.sequence for one in there), default=0)
        return [one for one in there if one.complete]

    def save(
        self,
        state: ShardedState,
        extras: dict[str, Any],
        rng: dict[str, Any],
        loss: float | None = None,
        wait: bool = True,
    ) -> list[SavedCheckpoint | FailedSave]:
        """Save extras["step"]; see `save` of commit.py.

        Returns what became durable and what failed for the disk; raises the rest.

        wait: until it is durable, and those are removed that need not be kept. Otherwise, with
        checkpoint.asynchronous, only until the state is copied, and `poll` tells the rest. A save
        that is still under way is waited for first.
        """
        begun = time.monotonic()
        finished = self._settle() if self._flight else []
        snapshot = snapshot_together(self.root, state, extras, rng, self.ranks)
        flight = self._flight = Future()
        self._begun, self._step = begun, extras["step"]
        if self.settings.asynchronous and not wait:
            Thread(
                target=self._write, args=(flight, snapshot, loss), name="checkpoint", daemon=True
            ).start()
            self._stall = time.monotonic() - begun
            return finished
        self._write(flight, snapshot, loss)
        self._stall = time.monotonic() - begun
        return finished + self._settle()

    def poll(self, wait: bool = False) -> list[SavedCheckpoint | FailedSave]:
        """What became of the save under way; nothing while a rank is at it.

        Costs nothing when there is none. Raises as `save` does.

        wait: until it is.
        """
        if self._flight is None or (not wait and self.ranks.any(not self._flight.done())):
            return []
        return self._settle()

    def _settle(self) -> list[SavedCheckpoint | FailedSave]:
        """Wait for the save under way; what it raised is the same on all ranks."""
        flight, self._flight = self._flight, None
        try:
            saved, durable, warnings = flight.result()
        except CheckpointSaveError as error:
            self._failures += 1
            return [FailedSave(self._step, error, self._failures)]
        self._failures = 0
        for text in warnings:
            self.warn(text)
        self._lineage = saved.lineage
        return [SavedCheckpoint(saved, durable - self._begun, self._stall)]

    def _write(self, flight: Future, snapshot: Snapshot, loss: float | None) -> None:
        """Commit, then let go of what need not be kept; the future gets the result."""
        try:
            saved = commit(
                self.root,
                snapshot,
                self._writers,
                self._lineage,
                loss,
                self.may_commit,
                self._above,
            )
            if self.mirror and self._writers.rank == 0:
                self.mirror.saved(saved.folder)
            durable = time.monotonic()
            try:
                warnings = self._retire()
            except UserError as error:  # the new one is durable: that is no failed save
                warnings = [f"warning: no old checkpoint was removed: {error}"]
            flight.set_result((saved, durable, warnings))
        # It is raised where the result is asked for; without one that would wait for ever
        except BaseException as error:
            flight.set_exception(error)

    def _retire(self) -> list[str]:
        """Remove what retention does not keep, if at least two of the others prove whole.

        Returns what to warn of.

        The newest was read when it was hashed, a moment ago.
        """
        names, surplus = run_on_rank_0(self._writers, self._plan)
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
                how = run_on_rank_0(
                    self._writers, lambda name=name: out_of_the_way(self.root / name)
                )
                warnings.append(
                    f"warning: checkpoint {self.root / name} is not usable: {problem}{how}"
                )
                surplus = [other for other in surplus if other != name]
        if len(whole) == VERIFIED:
            warnings += run_on_rank_0(
                self._writers, lambda: self._remove([name for name in surplus if name not in whole])
            )
        return warnings

    def _plan(self) -> tuple[list[str], list[str]]:
        """Names of (those to keep, those to let go), newest first."""
        listed = list_checkpoints(self.root)[0]
        keep = [
            one.folder.name
            for one in retained(
                listed, self.settings.keep_last, self.settings.keep_every, self.settings.keep_best
            )
        ]
        return keep, [one.folder.name for one in listed if one.folder.name not in keep]

    def _remove(self, names: list[str]) -> list[str]:
        warnings = []
        for name in reversed(names):  # the oldest first
            try:
                with self.mirror.removing(name) if self.mirror else nullcontext(True) as may:
                    if may:
                        remove(self.root / name)
            except OSError as error:  # training need not end for it; the next save tries again
                warnings.append(
                    f"warning: checkpoint {self.root / name} is no longer needed and cannot be"
                    f" removed: {error.strerror}"
                )
        return warnings
