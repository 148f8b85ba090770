"""Run lock: at most one job works in a run folder; RUN/lock-N.json names its holder.

N is a fencing token, which only grows. A start creates the file after the newest one (only one of
several starts can), and the newest file is the lock. The holder rewrites its file every few
seconds. A start is refused while the holder is alive. It takes over when the holder has released
the lock, has ended (known at once on the same machine), or was silent for a whole lease by this
start's own clock: two clocks are never compared. A holder that was suspended and lost the lock
finds a newer file right before it would rename its checkpoint into place, and its staging folders
were renamed by then.
"""

from __future__ import annotations

import os
import re
import threading
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from nextpt.base.errors import RunInUseError, UserError, print_notice
from nextpt.base.files import atomic_write, canonical_json, create_file, make_folder
from nextpt.base.json_files import read_json
from nextpt.base.processes import (
    LATEST_TIME,
    has_ended,
    is_on_this_machine,
    is_stopped,
    parse_identity,
    process_identity,
)
from nextpt.checkpoint.folders import STAGING, leftovers

HEARTBEAT = 5.0  # seconds between two writes of the holder
# Seconds of silence after which a lock may be taken over; far above the delays of shared file
# systems
LEASE = 60.0
NAME = re.compile(r"lock-([0-9]+)\.json")


class RunLock:
    """The lock of a run folder, held from construction until `release`, on one rank of a job.

    Construction may wait up to a lease to learn whether the holder is alive, and prints for whom.

    Args:
        folder: The run folder; created where it is missing.
        heartbeat: Seconds between two writes.
        lease: Seconds of silence after which a lock may be taken over.

    Attributes:
        lost: Whether another job is known to have taken the lock over.
        token: Number of this lock's file.

    Raises:
        RunInUseError: While another job holds the lock, before anything is written.
    """

    def __init__(self, folder: Path, heartbeat: float = HEARTBEAT, lease: float = LEASE) -> None:
        self.folder = folder
        self.heartbeat = heartbeat
        self.lost = False
        self._content = process_identity() | {
            "job": os.environ.get("SLURM_JOB_ID"),
            "since": time.time(),
            "held": True,
            "beat": 0,
        }
        self.token = self._acquire(lease)
        self._remove_older()
        self._remove_temporary_files()
        self._fence_staging_folders()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="run lock")
        self._thread.start()

    def check(self) -> None:
        """Check in the folder that this job still holds the lock.

        Raises:
            RunInUseError: When another job has taken it over.
            UserError: When the folder or the lock was removed.
        """
        try:
            newest = max(_tokens(self.folder), default=0)
        except (FileNotFoundError, NotADirectoryError):
            newest = 0
        self.lost = self.lost or newest != self.token
        if not newest:
            raise UserError(
                f"run folder {self.folder} or the lock in it was removed while this job worked"
                " there; restore its checkpoints, or start again from the first step"
            )
        if self.lost:
            raise RunInUseError(
                f"run folder {self.folder} was taken over by"
                f" {_describe_holder(_path(self.folder, newest))}, because this job was silent for"
                " too long (stopped, or cut off from the disk); it ends and leaves the folder to"
                " that one"
            )

    def release(self) -> None:
        """Release the lock for the next start. Does nothing to a lock that was lost."""
        self._stop.set()
        self._thread.join()
        with suppress(UserError, OSError):
            self.check()
            self._write(held=False)

    def _acquire(self, lease: float) -> int:
        make_folder(self.folder, "run.dir")
        while True:
            newest = max(_tokens(self.folder), default=0)
            if newest and not _is_over(_path(self.folder, newest), lease):
                raise RunInUseError(
                    f"run folder {self.folder} is in use by"
                    f" {_describe_holder(_path(self.folder, newest))}; wait"
                    " for it, end it, or give another run.dir"
                )
            token = newest + 1
            path = _path(self.folder, token)
            try:
                if not create_file(path, canonical_json(self._content)):
                    continue
            except FileNotFoundError:  # another job won, and removed this one's temporary file
                continue
            if max(_tokens(self.folder)) == token:
                return token
            # Others took the lock meanwhile and removed the file of this number.
            path.unlink(missing_ok=True)

    def _remove_older(self) -> None:
        for token in _tokens(self.folder):
            if token < self.token:
                with suppress(IsADirectoryError, PermissionError):  # a folder is no lock of a job
                    _path(self.folder, token).unlink(missing_ok=True)

    def _remove_temporary_files(self) -> None:
        """Remove what `atomic_write` left of killed processes: no other job uses these names."""
        for path in [*self.folder.glob(".*.tmp-*"), *self.folder.glob("stacks/.*.tmp-*")]:
            with suppress(IsADirectoryError, PermissionError):
                path.unlink(missing_ok=True)

    def _fence_staging_folders(self) -> None:
        """Rename staging folders, so that a suspended holder cannot commit them.

        The next save removes them.
        """
        names = (f"{STAGING}fenced-{self.token}-{number}" for number in count())
        for path in leftovers(self.folder / "checkpoints"):
            target = next(t for t in map(path.with_name, names) if not os.path.lexists(t))
            with suppress(FileNotFoundError):
                os.rename(path, target)

    def _beat(self) -> None:
        while not self._stop.wait(self.heartbeat):
            with suppress(OSError):  # a full disk or a lost mount: others see the silence
                try:
                    self.lost = max(_tokens(self.folder), default=0) != self.token
                except FileNotFoundError:  # removed
                    self.lost = True
                if self.lost:
                    return
                self._content["beat"] += 1
                self._write(held=True)

    def _write(self, held: bool) -> None:
        self._content["held"] = held
        with atomic_write(_path(self.folder, self.token)) as file:
            file.write(canonical_json(self._content))


def _path(folder: Path, token: int) -> Path:
    return folder / f"lock-{token}.json"


def _tokens(folder: Path) -> list[int]:
    return [int(match[1]) for match in map(NAME.fullmatch, os.listdir(folder)) if match]


def _read(path: Path) -> dict[str, Any] | None:
    """Read a lock file; {} while it is unreadable, None when there is none."""
    try:
        content = parse_identity(read_json(path))
    except FileNotFoundError:
        return None
    except (ValueError, OSError):
        return {}
    since, job = content.get("since"), content.get("job")
    is_time = isinstance(since, int | float) and 0 <= since < LATEST_TIME
    is_whole = is_time and type(content.get("held")) is bool and isinstance(job, str | None)
    return content if is_whole else {}


def _describe_holder(path: Path) -> str:
    """The holder of a lock, for messages."""
    holder = _read(path)
    if not holder:
        return f"another job ({path.name} cannot be read)"
    job = f", Slurm job {holder['job']}" if holder.get("job") else ""
    minutes = max(0.0, time.time() - holder["since"]) / 60
    age = f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
    return f"process {holder['pid']} on {holder['host']}{job}, which started {age} ago"


def _is_over(path: Path, lease: float) -> bool:
    """Whether the holder released the lock, ended, or was silent for a whole lease.

    Waits until that is known, and prints for whom and how long.
    """
    first = _read(path)
    deadline = time.monotonic() + lease
    waiting = False
    while True:
        content = _read(path)
        if content is None:
            return True
        if content and (not content["held"] or has_ended(content)):
            return True
        if content != first or (
            content and is_on_this_machine(content) and not is_stopped(content["pid"])
        ):
            return False
        if time.monotonic() >= deadline:
            return True
        if not waiting:
            waiting = True
            print_notice(
                f"run folder {path.parent} is held by {_describe_holder(path)}; waiting up to"
                f" {lease:.0f} s for a sign of life"
            )
        time.sleep(min(lease / 20, 1.0))
