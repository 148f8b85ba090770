"""Mirror of a run's checkpoints in an object store, uploaded by a background thread of rank 0.

Training never waits for it. The newest checkpoint that is not in the mirror is uploaded first. What
the run's own retention removes before its turn came is skipped and reported, so an outage of any
length neither fills the disk nor holds up training; only the one being uploaded stays until it is
done. The mirror keeps what the run keeps, and removes nothing unless two of those that stay were
read back and are valid.
"""

from __future__ import annotations

import platform
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from pathlib import Path

from nextpt.base.errors import CheckpointError, StoreError, UserError
from nextpt.base.stores import store_problem
from nextpt.checkpoint.errors import DamagedError, UnsupportedVersionError
from nextpt.checkpoint.folders import list_checkpoints
from nextpt.checkpoint.manifest import MANIFEST, ListedCheckpoint, read_manifest
from nextpt.checkpoint.mirror.archive import Archive, ArchivedCheckpoint, name_in_store
from nextpt.checkpoint.mirror.restore import list_mirror
from nextpt.checkpoint.mirror.retry import backoff_seconds, run_with_timeout
from nextpt.checkpoint.retention import VERIFIED_BEFORE_REMOVAL, retained
from nextpt.config import CheckpointSection
from nextpt.events import MirrorEvent

WARN_EVERY = 600.0  # seconds between two warnings about one outage


class _Ended(Exception):
    """The job ends: the upload under way is abandoned."""


class _TakenOver(Exception):
    """Another job writes this mirror now."""


class Mirror:
    """Mirror of one run. Every rank has one to restore from; rank 0's also uploads.

    `start` begins the uploading thread. The other methods are for the training thread and for the
    one that saves.

    Args:
        archive: Where the checkpoints go.
        root: Folder of the run's checkpoints.
        settings: Retention.
        run: Name of the run.
        may_write: Raises RunInUseError when another job took the run folder.
        accept: Raises UserError for a folder with a checkpoint of another run.
    """

    def __init__(
        self,
        archive: Archive,
        root: Path,
        settings: CheckpointSection,
        run: str,
        may_write: Callable[[], None] = lambda: None,
        accept: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        self.archive = archive
        self.root = root
        self.settings = settings
        self.run = run
        self.may_write = may_write
        self.accept = accept
        self.owner = uuid.uuid4().hex
        self.claimed = False
        self._events: queue.SimpleQueue[MirrorEvent] = queue.SimpleQueue()
        # Guards the next two attributes, and the removal of local checkpoints.
        self._lock = threading.Lock()
        self._uploading: str | None = None  # name of a local folder
        self._pending: dict[str, tuple[str, int]] = {}  # name in the store -> local name, step
        # Names in the store, each in at most one of these:
        self._verified: set[str] = set()  # read back by this job
        self._damaged: set[str] = set()  # damaged in the store
        self._damaged_locally: set[str] = set()  # damaged in the run folder
        self._changed, self._idle, self._ending, self._over = (threading.Event() for _ in range(4))
        self._warned_at: float | None = None
        self._uploader: threading.Thread | None = None  # the one thread that talks to the store
        self._blocks = 0  # sent or read

    def list_checkpoints(
        self, has_checkpoints: bool, warn: Callable[[str], None]
    ) -> list[ArchivedCheckpoint]:
        """Claim the mirror for this job and list its checkpoints; see `restore.list_mirror`."""

        def claim_and_list() -> list[ArchivedCheckpoint]:
            self._check_owner()
            return self.archive.checkpoints()

        return list_mirror(self.archive.uri, claim_and_list, has_checkpoints, self.root, warn)

    def start(self) -> None:
        """Start the uploading thread; local checkpoints that are not in the mirror are pending."""
        for checkpoint in list_checkpoints(self.root).checkpoints:
            self._add_pending(checkpoint)
        self._changed.set()
        threading.Thread(target=self._work, name="mirror", daemon=True).start()

    def notify_saved(self, folder: Path) -> None:
        """Tell the uploading thread of a new checkpoint."""
        # What cannot be read now is looked for again in the next round.
        with suppress(OSError, DamagedError):
            self._add_pending(ListedCheckpoint(folder, read_manifest(folder)))
        self._changed.set()

    def _add_pending(self, checkpoint: ListedCheckpoint) -> None:
        name = name_in_store(checkpoint.folder, checkpoint.manifest)
        with self._lock:
            self._pending.setdefault(name, (checkpoint.folder.name, checkpoint.manifest.step))

    @contextmanager
    def removal(self, name: str) -> Iterator[bool]:
        """Whether a local checkpoint may be removed in the block: not while it is uploaded."""
        with self._lock:
            yield name != self._uploading

    def drain_events(self) -> Iterator[MirrorEvent]:
        """Events since the last call."""
        while True:
            try:
                yield self._events.get_nowait()
            except queue.Empty:
                return

    def finish(self, seconds_left: Callable[[], float]) -> list[int]:
        """Wait until everything is mirrored, as long as there is time; then stop the thread.

        Returns:
            Steps of the checkpoints that are not mirrored.
        """
        while (
            not self._over.is_set()
            and (self._changed.is_set() or not self._idle.is_set())
            and seconds_left() > 0
        ):
            self._over.wait(0.05)
        self.stop()
        with self._lock:
            return sorted(step for _, step in self._pending.values())

    def stop(self) -> None:
        """Stop the thread at its next block. It is not waited for, because a store may hang."""
        self._ending.set()
        self._changed.set()

    def _work(self) -> None:
        failures = 0
        while not self._ending.is_set():
            # Before the round: `finish` must never find both clear while there is something to do.
            self._idle.clear()
            self._changed.clear()
            try:
                more = self._round_with_timeout()
                failures = 0
            except (_Ended, CancelledError):
                return
            except Exception as error:
                if isinstance(error, (UserError, _TakenOver)) and not isinstance(error, StoreError):
                    self._emit(0, "ended", str(error))
                    self._over.set()
                    return
                failures += 1
                self._emit_failure(error)
                self._ending.wait(backoff_seconds(failures))
                continue
            if not more:
                self._idle.set()
                self._changed.wait()

    def _round_with_timeout(self) -> bool:
        """A round in a thread that is abandoned when the store hangs.

        Should that thread ever continue, it ends at its next block.
        """

        def act() -> bool:
            self._uploader = threading.current_thread()
            return self._round()

        try:
            return run_with_timeout(act, lambda: self._blocks, self._ending.is_set)
        finally:
            self._uploader = None
            with self._lock:
                self._uploading = None

    def _round(self) -> bool:
        """Do the most urgent thing. False when there was none."""
        with self._lock:
            self._skip(
                name
                for name, (local, _) in self._pending.items()
                if not (self.root / local / MANIFEST).exists()
            )
        self._check_owner()
        stored = {checkpoint.name: checkpoint for checkpoint in self.archive.checkpoints()}
        local, mirrored = self._local_checkpoints(), self._valid_checkpoints(stored)
        missing = [
            name
            for name in self._retained(local | mirrored)
            if name not in mirrored and name not in self._damaged_locally
        ]
        self._count_block()
        with self._lock:
            for name in self._pending.keys() & mirrored.keys():
                del self._pending[name]
            self._skip(name for name in self._pending if name in local and name not in missing)
        if missing:
            self._upload(missing[0], local[missing[0]])
            return True
        return self._remove_surplus(stored, mirrored)

    def _check_owner(self) -> None:
        """Check that this job may write here; claim the mirror the first time.

        Raises:
            RunInUseError: Another job took the run folder.
            CheckpointError: The mirror holds another run.
            _TakenOver: Another job claimed the mirror.
        """
        self.may_write()
        # The training thread has done this already, in `list_checkpoints`, if the store answered.
        if not self.claimed:
            note = self.archive.read_note()
            if note is not None and note.get("run") != self.run:
                raise CheckpointError(
                    f"checkpoint.mirror = {self.archive.uri} holds the run {note.get('run')!r},"
                    f" and this one is {self.run!r}; give each run a URI of its own"
                )
            self.archive.claim(self.run, self.owner, platform.node())
            self.claimed = True
        note = self.archive.read_note() or {}
        if note.get("owner") != self.owner:
            raise _TakenOver(f"{self.archive.uri} was taken over by a job on {note.get('host')}")

    def _count_block(self) -> None:
        """Count a block as progress; raises _Ended when this thread must stop."""
        if self._ending.is_set() or threading.current_thread() is not self._uploader:
            raise _Ended
        self._blocks += 1

    def _may_commit(self) -> None:
        self._count_block()
        self._check_owner()

    def _local_checkpoints(self) -> dict[str, ListedCheckpoint]:
        """Checkpoints of the run folder by their names in the store."""
        local = {}
        for checkpoint in list_checkpoints(self.root).checkpoints:
            with suppress(OSError):  # retention may remove one at this moment
                local[name_in_store(checkpoint.folder, checkpoint.manifest)] = checkpoint
        return local

    def _valid_checkpoints(
        self, stored: dict[str, ArchivedCheckpoint]
    ) -> dict[str, ListedCheckpoint]:
        """Complete checkpoints of the store that are not known to be damaged."""
        valid = {}
        for name, checkpoint in stored.items():
            if checkpoint.complete and name not in self._damaged:
                try:
                    valid[name] = ListedCheckpoint(Path(name), self.archive.manifest(checkpoint))
                except DamagedError as problem:
                    self._record_damaged(checkpoint, str(problem))
                except UnsupportedVersionError:
                    continue  # left alone
        return valid

    def _retained(self, checkpoints: dict[str, ListedCheckpoint]) -> list[str]:
        """Names of those that retention keeps, newest first."""
        newest_first = sorted(checkpoints.values(), key=lambda c: c.manifest.sequence, reverse=True)
        names = {id(checkpoint): name for name, checkpoint in checkpoints.items()}
        settings = self.settings
        kept = retained(newest_first, settings.keep_last, settings.keep_every, settings.keep_best)
        return [names[id(checkpoint)] for checkpoint in kept]

    def _upload(self, name: str, checkpoint: ListedCheckpoint) -> None:
        folder, manifest = checkpoint.folder, checkpoint.manifest
        with self._lock:
            if not (folder / MANIFEST).exists():
                return
            self._uploading = folder.name
        started = time.monotonic()
        try:
            self.archive.upload(folder, manifest, self._may_commit, self._count_block)
        except DamagedError as problem:
            self._damaged_locally.add(name)
            with self._lock:
                self._pending.pop(name, None)
            self._emit(manifest.step, "skipped", f"{folder} is not mirrored: {problem}")
            return
        except OSError:
            if (folder / MANIFEST).exists():
                raise
            return  # it was set aside as damaged, or removed by a user
        finally:
            with self._lock:
                if threading.current_thread() is self._uploader:
                    self._uploading = None
        self._count_block()
        self._verified.add(name)
        self._damaged.discard(name)
        with self._lock:
            self._pending.pop(name, None)
        self._emit(
            manifest.step,
            "mirrored",
            path=f"{self.archive.uri}/{name}",
            seconds=time.monotonic() - started,
            size=manifest.bytes,
        )

    def _remove_surplus(
        self, stored: dict[str, ArchivedCheckpoint], mirrored: dict[str, ListedCheckpoint]
    ) -> bool:
        """Remove incomplete checkpoints, and those that retention does not keep.

        The latter only if two of those that stay prove valid. False: there is nothing more to do.
        """
        keep = self._retained(mirrored)
        surplus = [name for name in sorted(mirrored, reverse=True) if name not in keep]
        for checkpoint in stored.values():
            if not checkpoint.complete:
                self._remove(checkpoint)
        if not surplus and not self._damaged & stored.keys():
            return False
        valid: list[str] = []
        for name in [*keep, *surplus]:
            if len(valid) == VERIFIED_BEFORE_REMOVAL:
                break
            if name not in self._verified:
                problem = self.archive.problem(stored[name], self._count_block)
                if problem:
                    self._record_damaged(stored[name], problem)
                    return True  # the run folder may have it, to be uploaded again
            self._verified.add(name)
            valid.append(name)
        if len(valid) == VERIFIED_BEFORE_REMOVAL:
            for name in reversed([*surplus, *(self._damaged & stored.keys())]):
                if name not in valid:
                    self._remove(stored[name])
                    self._damaged.discard(name)
        return False

    def _remove(self, checkpoint: ArchivedCheckpoint) -> None:
        self._may_commit()
        self.archive.remove(checkpoint)

    def _record_damaged(self, checkpoint: ArchivedCheckpoint, problem: str) -> None:
        self._damaged.add(checkpoint.name)
        self._verified.discard(checkpoint.name)
        path = f"{self.archive.uri}/{checkpoint.name}"
        self._emit(checkpoint.step, "damaged", f"{path} is not usable: {problem}")

    def _skip(self, names: Iterable[str]) -> None:
        """Drop pending checkpoints that the run no longer keeps. Holds the lock."""
        for name in list(names):
            local, step = self._pending.pop(name)
            path = self.root / local
            self._emit(step, "skipped", f"{path} was removed before it could be mirrored")

    def _emit(
        self,
        step: int,
        status: str,
        message: str = "",
        path: str = "",
        seconds: float = 0.0,
        size: int = 0,
    ) -> None:
        pending = len(self._pending)
        self._events.put(MirrorEvent(step, status, message, path, seconds, size, pending))

    def _emit_failure(self, error: Exception) -> None:
        now = time.monotonic()
        if self._warned_at is not None and now - self._warned_at < WARN_EVERY:
            return
        self._warned_at = now
        step = max((step for _, step in list(self._pending.values())), default=0)
        self._emit(step, "failing", str(store_problem(error, self.archive.uri)))
