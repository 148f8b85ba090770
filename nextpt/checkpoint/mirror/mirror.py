"""The mirror of a run's checkpoints in an object store: a thread of rank 0 brings them there.

Training never waits for it.

The newest that is not there comes first. What the run's own retention removes before its turn came
is passed over and told, so an outage of any length neither fills the disk nor holds training; only
the one being sent stays until it is there. The mirror keeps what the run keeps, and removes nothing
unless two of those that stay were read back and are whole.
"""

from __future__ import annotations

import platform
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from pathlib import Path

from nextpt.base.errors import CheckpointError, UserError
from nextpt.base.stores import store_problem
from nextpt.checkpoint.folders import list_checkpoints
from nextpt.checkpoint.manifest import (
    MANIFEST,
    DamagedError,
    ListedCheckpoint,
    UnsupportedVersionError,
    read_manifest,
)
from nextpt.checkpoint.mirror.archive import (
    Archive,
    ArchivedCheckpoint,
    in_time,
    name_in_store,
    pause,
)
from nextpt.checkpoint.mirror.restore import look
from nextpt.checkpoint.retention import VERIFIED, retained
from nextpt.config import CheckpointSection
from nextpt.events import MirrorEvent

TELL_EVERY = 600.0  # seconds between two warnings of one outage


class _Ended(Exception):
    """The job ends: what is being sent is left as it is."""


class _Lost(Exception):
    """Another job writes this mirror now."""


class Mirror:
    """root: the folder of the run's checkpoints. may_write: raises RunInUseError when another job took the run folder.

    accept: raises UserError for a folder with a checkpoint of another run. Every rank has one, for
    coming back; on rank 0 `begin` starts the thread. The other methods are for the thread of the
    training, and for that which saves.
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
        self.owner, self.claimed = uuid.uuid4().hex, False
        self._news: queue.SimpleQueue[MirrorEvent] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of what follows, and of the removal of local checkpoints
        self._sending: str | None = None  # name of a local folder
        self._waiting: dict[str, tuple[str, int]] = {}  # name in the store -> local name, step
        self._whole: set[str] = set()  # names in the store: read back by this job,
        self._bad: set[str] = set()  # found damaged there,
        self._spoiled: set[str] = set()  # found damaged here,
        self._foreign: set[str] = set()  # of a newer format
        self._changed, self._idle, self._ending, self._over = (threading.Event() for _ in range(4))
        self._told_at: float | None = None
        self._sender: threading.Thread | None = None  # the one thread that talks to the store
        self._blocks = 0  # sent or read

    def look(self, has_checkpoints: bool, warn: Callable[[str], None]) -> list[ArchivedCheckpoint]:
        """What is there, newest first, and the mirror is this job's from now on.

        See `comeback.look`.
        """

        def look_there() -> list[ArchivedCheckpoint]:
            self._own()
            return self.archive.checkpoints()

        return look(self.archive.place, look_there, has_checkpoints, self.root, warn)

    def begin(self) -> None:
        """Start the thread; it looks for checkpoints here that are not there yet."""
        for one in list_checkpoints(self.root)[0]:
            self._note(one)
        self._changed.set()
        threading.Thread(target=self._work, name="mirror", daemon=True).start()

    def saved(self, folder: Path) -> None:
        """Hear of a new checkpoint."""
        # What cannot be read now is looked for again in the next round
        with suppress(OSError, DamagedError):
            self._note(ListedCheckpoint(folder, read_manifest(folder)))
        self._changed.set()

    def _note(self, one: ListedCheckpoint) -> None:
        with self._lock:
            self._waiting.setdefault(
                name_in_store(one.folder, one.manifest), (one.folder.name, one.manifest.step)
            )

    @contextmanager
    def removing(self, name: str) -> Iterator[bool]:
        """Whether a local checkpoint may be removed in the block; not while it is being sent."""
        with self._lock:
            yield name != self._sending

    def news(self) -> Iterator[MirrorEvent]:
        """What happened since the last call."""
        while True:
            try:
                yield self._news.get_nowait()
            except queue.Empty:
                return

    def finish(self, seconds_left: Callable[[], float]) -> list[int]:
        """Wait until all is mirrored, as long as there is time; then end the thread.

        Returns the steps that are not.
        """
        while (
            not self._over.is_set()
            and (self._changed.is_set() or not self._idle.is_set())
            and seconds_left() > 0
        ):
            self._over.wait(0.05)
        self.end()
        with self._lock:
            return sorted(step for _, step in self._waiting.values())

    def end(self) -> None:
        """End the thread at the next block; it is not waited for, for a store may hang."""
        self._ending.set()
        self._changed.set()

    def _work(self) -> None:
        failures = 0
        while not self._ending.is_set():
            # Before the next: `finish` must never find both clear while there is something to do
            self._idle.clear()
            self._changed.clear()
            try:
                more = self._turn()
                failures = 0
            except (_Ended, CancelledError):
                return
            except (UserError, _Lost) as end:
                self._tell(0, "ended", str(end))
                self._over.set()
                return
            except Exception as error:
                failures += 1
                self._tell_failure(error)
                self._ending.wait(pause(failures))
                continue
            if not more:
                self._idle.set()
                self._changed.wait()

    def _turn(self) -> bool:
        """A round in a thread that is left to itself when the store hangs.

        Should it ever go on, it ends at its next block.
        """

        def act() -> bool:
            self._sender = threading.current_thread()
            return self._round()

        try:
            return in_time(act, lambda: self._blocks, self._ending.is_set)
        finally:
            self._sender = None
            with self._lock:
                self._sending = None

    def _round(self) -> bool:
        """Do the most urgent thing. False when there was none."""
        with self._lock:
            self._pass_over(
                [
                    name
                    for name, (local, _) in self._waiting.items()
                    if not (self.root / local / MANIFEST).exists()
                ]
            )
        self._own()
        stored = {one.name: one for one in self.archive.checkpoints()}
        here, there = self._here(), self._there(stored)
        todo = [
            name
            for name in self._keep(here | there)
            if name not in there and name not in self._spoiled
        ]
        self._going_on()
        with self._lock:
            for name in self._waiting.keys() & there.keys():
                del self._waiting[name]
            self._pass_over([name for name in self._waiting if name in here and name not in todo])
        if todo:
            self._send(todo[0], here[todo[0]])
            return True
        return self._retire(stored, there)

    def _own(self) -> None:
        """Be the one that writes here.

        Raises RunInUseError, CheckpointError or _Lost when that may not be.
        """
        self.may_write()
        # By `look` already, in the thread of the training, where the store answered
        if not self.claimed:
            note = self.archive.note()
            if note is not None and note.get("run") != self.run:
                raise CheckpointError(
                    f"checkpoint.mirror = {self.archive.place} holds the run {note.get('run')!r},"
                    f" and this one is {self.run!r}; give each run an address of its own"
                )
            self.archive.claim(self.run, self.owner, platform.node())
            self.claimed = True
        note = self.archive.note() or {}
        if note.get("owner") != self.owner:
            raise _Lost(f"{self.archive.place} was taken over by a job on {note.get('host')}")

    def _going_on(self) -> None:
        if self._ending.is_set() or threading.current_thread() is not self._sender:
            raise _Ended
        self._blocks += 1

    def _may_finish(self) -> None:
        self._going_on()
        self._own()

    def _here(self) -> dict[str, ListedCheckpoint]:
        """Local checkpoints by their names in the store."""
        found = {}
        for one in list_checkpoints(self.root)[0]:
            try:
                found[name_in_store(one.folder, one.manifest)] = one
            except OSError:  # retention took it in this moment
                continue
        return found

    def _there(self, stored: dict[str, ArchivedCheckpoint]) -> dict[str, ListedCheckpoint]:
        """Checkpoints of the store that are not known to be damaged."""
        found = {}
        for name, one in stored.items():
            if one.complete and name not in self._bad:
                try:
                    found[name] = ListedCheckpoint(Path(name), self.archive.manifest(one))
                except DamagedError as problem:
                    self._found_damaged(one, str(problem))
                except UnsupportedVersionError:
                    self._foreign.add(name)
        return found

    def _keep(self, found: dict[str, ListedCheckpoint]) -> list[str]:
        """Those that retention keeps of these, newest first."""
        newest_first = sorted(found.values(), key=lambda one: one.manifest.sequence, reverse=True)
        names = {id(one): name for name, one in found.items()}
        return [
            names[id(one)]
            for one in retained(
                newest_first,
                self.settings.keep_last,
                self.settings.keep_every,
                self.settings.keep_best,
            )
        ]

    def _send(self, name: str, one: ListedCheckpoint) -> None:
        with self._lock:
            if not (one.folder / MANIFEST).exists():
                return
            self._sending = one.folder.name
        begun = time.monotonic()
        try:
            self.archive.send(one.folder, one.manifest, self._may_finish, self._going_on)
        except DamagedError as problem:
            self._spoiled.add(name)
            with self._lock:
                self._waiting.pop(name, None)
            self._tell(one.manifest.step, "passed over", f"{one.folder} is not mirrored: {problem}")
            return
        except OSError:
            if (one.folder / MANIFEST).exists():
                raise
            return  # it was set aside as damaged, or removed by a person
        finally:
            with self._lock:
                self._sending = (
                    None if threading.current_thread() is self._sender else self._sending
                )
        self._going_on()
        self._whole.add(name)
        self._bad.discard(name)
        with self._lock:
            self._waiting.pop(name, None)
        self._tell(
            one.manifest.step,
            "mirrored",
            path=f"{self.archive.place}/{name}",
            seconds=time.monotonic() - begun,
            size=one.manifest.bytes,
        )

    def _retire(
        self, stored: dict[str, ArchivedCheckpoint], there: dict[str, ListedCheckpoint]
    ) -> bool:
        """Remove what retention does not keep, if two of those that stay prove whole, and what was not finished. False: nothing to do."""
        keep = self._keep(there)
        surplus = [name for name in sorted(there, reverse=True) if name not in keep]
        for name, one in stored.items():
            if not one.complete:
                self._remove(one)
        if not surplus and not self._bad & stored.keys():
            return False
        whole: list[str] = []
        for name in [*keep, *surplus]:
            if len(whole) == VERIFIED:
                break
            problem = (
                None if name in self._whole else self.archive.problem(stored[name], self._going_on)
            )
            if problem:
                self._found_damaged(stored[name], problem)
                return True  # it may be here to be sent again
            self._whole.add(name)
            whole.append(name)
        if len(whole) == VERIFIED:
            for name in reversed([*surplus, *(self._bad & stored.keys())]):
                if name not in whole:
                    self._remove(stored[name])
                    self._bad.discard(name)
        return False

    def _remove(self, one: ArchivedCheckpoint) -> None:
        self._going_on()
        self._own()
        self.archive.remove(one)

    def _found_damaged(self, one: ArchivedCheckpoint, problem: str) -> None:
        self._bad.add(one.name)
        self._whole.discard(one.name)
        self._tell(one.step, "damaged", f"{self.archive.place}/{one.name} is not usable: {problem}")

    def _pass_over(self, names: list[str]) -> None:
        for name in names:
            local, step = self._waiting.pop(name)
            self._news.put(
                MirrorEvent(
                    step,
                    "passed over",
                    f"{self.root / local} was let go before it could be mirrored",
                    waiting=len(self._waiting),
                )
            )

    def _tell(
        self,
        step: int,
        status: str,
        message: str = "",
        path: str = "",
        seconds: float = 0.0,
        size: int = 0,
    ) -> None:
        self._news.put(MirrorEvent(step, status, message, path, seconds, size, len(self._waiting)))

    def _tell_failure(self, error: Exception) -> None:
        now = time.monotonic()
        if self._told_at is not None and now - self._told_at < TELL_EVERY:
            return
        self._told_at = now
        step = max((step for _, step in list(self._waiting.values())), default=0)
        self._tell(step, "failing", str(store_problem(error, self.archive.place)))
