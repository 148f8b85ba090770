"""Checkpoints of one run: resume, save in the background, rollback, retention, mirror."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

from nextpt.base.collective import RankGroup
from nextpt.base.errors import (
    CheckpointError,
    CheckpointSaveError,
    NoValidCheckpointError,
    same_on_all_ranks,
)
from nextpt.checkpoint.commit import CommittedCheckpoint, commit, snapshot_on_all_ranks
from nextpt.checkpoint.folders import clear_leftovers, list_checkpoints, remove, steps, stray_files
from nextpt.checkpoint.format import Checkpoint, Snapshot
from nextpt.checkpoint.manifest import Lineage, read_manifest
from nextpt.checkpoint.mirror.archive import ArchivedCheckpoint
from nextpt.checkpoint.mirror.mirror import Mirror
from nextpt.checkpoint.mirror.restore import fetch
from nextpt.checkpoint.retention import VERIFIED_BEFORE_REMOVAL, retained
from nextpt.checkpoint.selection import (
    read_on_rank_0,
    select_checkpoint,
    select_earlier_checkpoint,
    try_set_aside,
)
from nextpt.checkpoint.state import ShardedState
from nextpt.checkpoint.verification import verify_files
from nextpt.config import CheckpointSection


@dataclass(frozen=True)
class SavedCheckpoint:
    """A save that became durable.

    Attributes:
        checkpoint: Where it is, and its size.
        seconds: From the call of `save` until it was durable.
        stall_seconds: Part of it for which training stood still.
    """

    checkpoint: CommittedCheckpoint
    seconds: float
    stall_seconds: float


@dataclass(frozen=True)
class FailedSave:
    """A save that the disk did not take; nothing of it is left.

    Attributes:
        step: Its step.
        error: What the disk answered.
        consecutive: Number of failed saves in a row, with this one.
    """

    step: int
    error: CheckpointSaveError
    consecutive: int


class _Written(NamedTuple):
    """What the writing thread hands to the training thread."""

    checkpoint: CommittedCheckpoint
    durable_at: float  # time.monotonic()
    warnings: list[str]


class CheckpointManager:
    """The checkpoints of one run, as its training sees them. All methods are collective.

    With checkpoint.asynchronous a thread writes, one save at a time. It has a process group of its
    own, because two threads of a rank must not take turns in one. Its outcome is agreed upon and
    reported by the training thread.

    Args:
        root: Folder of the run's checkpoints.
        settings: Section `checkpoint` of the config.
        group: The ranks that train.
        warn: Shows a line to the user; rank 0's is the one to read.
        may_commit: See `commit.save`.
        mirror: Mirror of the checkpoints in an object store, or None.
    """

    def __init__(
        self,
        root: Path,
        settings: CheckpointSection,
        group: RankGroup,
        warn: Callable[[str], None],
        may_commit: Callable[[], None] = lambda: None,
        mirror: Mirror | None = None,
    ) -> None:
        self.root = root
        self.settings = settings
        self.group = group
        self.warn = warn
        self.may_commit = may_commit
        self.mirror = mirror
        self._mirror_sequence = 0  # the highest sequence number in the mirror
        self._lineage: Lineage = []
        self._writers = group.duplicate() if settings.asynchronous else group
        self._pending: Future[_Written] | None = None
        self._step = self._failures = 0
        self._started = self._stall = 0.0

    def resume(self) -> Checkpoint | None:
        """Find the checkpoint to resume from, and continue its lineage.

        With a mirror, its checkpoints count too. Leftovers of killed saves are removed: after a
        job that was killed in its last save they would stay.

        Returns:
            The checkpoint, verified; None to start from step 0.

        Raises:
            CheckpointError: See `selection.select_checkpoint` and `mirror.restore.list_mirror`.
        """
        read_on_rank_0(self.root, self.group, self._clear)
        checkpoint = self._select() if self.mirror is None else self._select_with(self.mirror)
        if checkpoint is not None:
            self._lineage = read_manifest(checkpoint.folder).lineage
        return checkpoint

    def _clear(self) -> None:
        """Remove leftovers; on rank 0."""
        clear_leftovers(self.root)
        for path in stray_files(self.root):
            self.warn(f"{path} is a file or a link, and not of a save; remove it")

    def rollback(self, step: int) -> Checkpoint | None:
        """Find the newest checkpoint of this lineage from before `step`, and continue from it.

        No save may be under way.

        Returns:
            The checkpoint, verified; None when there is none.
        """
        assert self._pending is None
        checkpoint = select_earlier_checkpoint(
            self.root, step, self._lineage, self.group, self.warn
        )
        if checkpoint is not None:
            self._lineage = read_manifest(checkpoint.folder).lineage
        return checkpoint

    def _select(self) -> Checkpoint | None:
        return select_checkpoint(
            self.root, self.settings.resume, self.group, self.warn, repair=True
        )

    def _select_with(self, mirror: Mirror) -> Checkpoint | None:
        """As `_select`, with the checkpoints of the mirror.

        The highest sequence number wins; of equal ones, the run folder's.

        Raises:
            NoValidCheckpointError: There are checkpoints, local or mirrored, and none is valid.
        """
        uri, resume = mirror.archive.uri, self.settings.resume
        mirrored = self._list_mirror(mirror)
        checkpoint = problem = None
        local_steps = read_on_rank_0(self.root, self.group, lambda: steps(self.root))
        if resume in ("auto", "never") or resume in local_steps:
            try:
                checkpoint = self._select()
            except NoValidCheckpointError as error:
                problem = error
        newest = -1 if checkpoint is None else read_manifest(checkpoint.folder).sequence
        candidates = [
            archived
            for archived in mirrored
            if (
                archived.sequence > newest
                if resume == "auto"
                else checkpoint is None and archived.step == resume
            )
        ]
        for archived in candidates:
            reason = fetch(
                mirror.archive, archived, self.root, self.group, mirror.accept, self.may_commit
            )
            if reason is None:
                self.warn(f"step {archived.step} fetched from the mirror {uri}")
                return self._select()
            self.warn(
                f"warning: checkpoint {uri}/{archived.name} is not usable: {reason};"
                " trying the one before it"
            )
        if checkpoint is None and (problem or candidates):
            raise problem or same_on_all_ranks(
                NoValidCheckpointError(
                    f"the mirror {uri} has checkpoints of this run and none is valid; look at"
                    " them, or give another run.dir and checkpoint.mirror"
                )
            )
        return self._select() if checkpoint is None else checkpoint

    def _list_mirror(self, mirror: Mirror) -> list[ArchivedCheckpoint]:
        """Complete checkpoints of the mirror, newest first.

        Raises:
            CheckpointError: There are some, and checkpoint.resume is "never".
        """

        def list_on_rank_0() -> list[tuple[str, bool]]:
            archived = mirror.list_checkpoints(bool(steps(self.root)), self.warn)
            if self.settings.resume == "never" and any(a.complete for a in archived):
                raise CheckpointError(
                    f"checkpoint.resume = never, but the mirror {mirror.archive.uri} holds"
                    " checkpoints of this run; give another one or remove them"
                )
            return [(a.name, a.complete) for a in archived]

        archived = [
            ArchivedCheckpoint(name, complete)
            for name, complete in read_on_rank_0(self.root, self.group, list_on_rank_0)
        ]
        self._mirror_sequence = max((a.sequence for a in archived), default=0)
        return [a for a in archived if a.complete]

    def save(
        self,
        state: ShardedState,
        extras: Mapping[str, Any],
        rng: Mapping[str, Any],
        loss: float | None = None,
        wait: bool = True,
    ) -> list[SavedCheckpoint | FailedSave]:
        """Save the state of step extras["step"]. A save under way is waited for first.

        Args:
            state: See `commit.save`, as for the next three.
            extras: See `commit.save`.
            rng: See `commit.save`.
            loss: See `commit.save`.
            wait: Return when the checkpoint is durable and surplus ones were removed. Otherwise,
                with checkpoint.asynchronous, return when the state is copied; `poll` reports.

        Returns:
            Saves that became durable, and those that the disk did not take.

        Raises:
            CheckpointError: A save failed for another reason than the disk.
        """
        started = time.monotonic()
        outcomes = self._collect()
        snapshot = snapshot_on_all_ranks(self.root, state, extras, rng, self.group)
        pending = self._pending = Future()
        self._started, self._step = started, extras["step"]
        if self.settings.asynchronous and not wait:
            Thread(
                target=self._write, args=(pending, snapshot, loss), name="checkpoint", daemon=True
            ).start()
            self._stall = time.monotonic() - started
            return outcomes
        self._write(pending, snapshot, loss)
        self._stall = time.monotonic() - started
        return outcomes + self._collect()

    def poll(self, wait: bool = False) -> list[SavedCheckpoint | FailedSave]:
        """Report the save under way once all ranks have finished it; free when there is none.

        Args:
            wait: Wait until it is finished.

        Returns:
            As `save`.

        Raises:
            CheckpointError: As `save`.
        """
        if self._pending is None or (not wait and self.group.any(not self._pending.done())):
            return []
        return self._collect()

    def _collect(self) -> list[SavedCheckpoint | FailedSave]:
        """Wait for the save under way, if any; what it raised is the same on all ranks."""
        if self._pending is None:
            return []
        pending, self._pending = self._pending, None
        try:
            checkpoint, durable_at, warnings = pending.result()
        except CheckpointSaveError as error:
            self._failures += 1
            return [FailedSave(self._step, error, self._failures)]
        self._failures = 0
        for text in warnings:
            self.warn(text)
        self._lineage = checkpoint.lineage
        return [SavedCheckpoint(checkpoint, durable_at - self._started, self._stall)]

    def _write(self, pending: Future[_Written], snapshot: Snapshot, loss: float | None) -> None:
        """Commit, then remove surplus checkpoints; the future gets the outcome."""
        try:
            checkpoint = commit(
                self.root,
                snapshot,
                self._writers,
                self._lineage,
                loss,
                self.may_commit,
                self._mirror_sequence,
            )
            if self.mirror and self._writers.rank == 0:
                self.mirror.notify_saved(checkpoint.folder)
            durable_at = time.monotonic()
            try:
                warnings = self._remove_surplus()
            except CheckpointError as error:  # the new one is durable: this is no failed save
                warnings = [f"warning: no old checkpoint was removed: {error}"]
            pending.set_result(_Written(checkpoint, durable_at, warnings))
        # It is raised where the result is asked for; without a result that would wait forever.
        except BaseException as error:
            pending.set_exception(error)

    def _remove_surplus(self) -> list[str]:
        """Remove what retention does not keep, if two of the others prove valid.

        The newest was read when it was hashed, a moment ago, and counts as one of the two.

        Returns:
            Warnings.
        """
        kept, surplus = read_on_rank_0(self.root, self._writers, self._plan_retention)
        if not surplus:
            return []
        valid, warnings = kept[:1], []
        for name in [*kept[1:], *surplus]:
            if len(valid) == VERIFIED_BEFORE_REMOVAL:
                break
            folder = self.root / name
            problem = verify_files(folder, self._writers)
            if problem is None:
                valid.append(name)
            else:
                remark = read_on_rank_0(self.root, self._writers, partial(try_set_aside, folder))
                warnings.append(f"warning: checkpoint {folder} is not usable: {problem}{remark}")
                surplus = [other for other in surplus if other != name]
        if len(valid) == VERIFIED_BEFORE_REMOVAL:
            removable = [name for name in surplus if name not in valid]
            warnings += read_on_rank_0(self.root, self._writers, lambda: self._remove(removable))
        return warnings

    def _plan_retention(self) -> tuple[list[str], list[str]]:
        """Names of the checkpoints to keep and of those to remove, newest first."""
        checkpoints = list_checkpoints(self.root).checkpoints
        settings = self.settings
        kept = [
            checkpoint.folder.name
            for checkpoint in retained(
                checkpoints, settings.keep_last, settings.keep_every, settings.keep_best
            )
        ]
        return kept, [c.folder.name for c in checkpoints if c.folder.name not in kept]

    def _remove(self, names: list[str]) -> list[str]:
        """Remove checkpoints, oldest first; `names` is newest first. Returns warnings."""
        warnings = []
        for name in reversed(names):
            try:
                with self.mirror.removal(name) if self.mirror else nullcontext(True) as allowed:
                    if allowed:
                        remove(self.root / name)
            except OSError as error:  # training need not end; the next save tries again
                warnings.append(
                    f"warning: checkpoint {self.root / name} is no longer needed and cannot be"
                    f" removed: {error.strerror}"
                )
        return warnings
