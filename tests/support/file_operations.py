"""Fault injection at a chosen file operation: a kill of the process or a block, or an error.

An audit hook sees every operation: opening to write, renaming, removing, making folders. Syncing
and the writing of tensor files have no audit event and are patched. With a power loss, unsynced
data is lost too: a file keeps half of its bytes, and in an unsynced folder new files are missing
and renamed ones have their old names. (Undone removals are not simulated.)
"""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nextpt.checkpoint import format as checkpoint_format

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
TOUCHES = CHANGES | {"open", "os.listdir", "os.scandir", "shutil.rmtree"}


class Killed(BaseException):
    """Simulated SIGKILL: no `except Exception` catches it, and every later file operation fails."""


class _Plan:
    def __init__(
        self,
        root: Path,
        at: int | None,
        real: bool,
        power_loss: bool,
        watch: Callable[[], None] | None,
    ) -> None:
        self.root = str(root)
        self.at = at
        self.real = real
        self.power_loss = power_loss
        self.watch = watch
        self.count, self.dead, self.paused, self.lock = 0, False, False, threading.RLock()
        self.contents: set[str] = set()  # files whose bytes were not synced
        # (path, its name before or None), in folders that were not synced
        self.names: list[tuple[str, str | None]] = []

    def operation(self) -> None:
        """Called before each operation that changes something."""
        if self.dead:
            raise Killed
        if self.watch:
            self.aside(self.watch)
        if self.count == self.at:
            if self.power_loss:
                self.aside(self.lose)
            if self.real:
                os.kill(os.getpid(), signal.SIGKILL)
            self.dead = True
            raise Killed
        self.count += 1

    def aside(self, action: Callable[[], None]) -> None:
        self.paused = True
        try:
            action()
        finally:
            self.paused = False

    def wrote(self, path: str) -> None:
        with self.lock:
            self.contents.add(path)
            if not os.path.exists(path):
                self.names.append((path, None))

    def renamed(self, old: str, new: str) -> None:
        with self.lock:
            self.contents = {
                new + p[len(old) :] if p.startswith(old + "/") else p for p in self.contents
            }
            self.names = [
                (new + p[len(old) :] if p.startswith(old + "/") else p, before)
                for p, before in self.names
            ] + [(new, old)]

    def synced(self, path: str) -> None:
        with self.lock:
            self.contents.discard(path)
            self.names = [(p, before) for p, before in self.names if os.path.dirname(p) != path]

    def lose(self) -> None:
        with self.lock:
            for path in filter(os.path.isfile, self.contents):
                os.truncate(path, os.path.getsize(path) // 2)
            for path, before in reversed(self.names):
                if before and os.path.exists(path):
                    os.rename(path, before)
                elif os.path.isfile(path):
                    os.remove(path)


_plan: _Plan | None = None
_refused: tuple[re.Pattern[str], int] | None = None
_installed = False


def _refuse(path: str) -> None:
    if _refused and _refused[0].search(path):
        raise OSError(_refused[1], os.strerror(_refused[1]), path)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if (
        _refused
        and event == "open"
        and isinstance(arguments[0], str)
        and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    ):
        _refuse(arguments[0])
    plan = _plan
    if plan is None or plan.paused or event not in TOUCHES:
        return
    if plan.dead:
        raise Killed
    path, *rest = arguments
    writes = event == "open" and rest[1] & (os.O_WRONLY | os.O_RDWR)
    if (event in CHANGES or writes) and (plan.root in str(path) or not os.path.isabs(str(path))):
        plan.operation()
        if writes:
            plan.wrote(str(path))
        elif event == "os.rename":
            plan.renamed(str(path), str(rest[0]))


@contextmanager
def refusing(pattern: str, number: int) -> Iterator[None]:
    """Refuse files whose path matches, with this errno, when opened to write or synced."""
    global _refused
    _install()
    sync, save_file = os.fsync, checkpoint_format.save_file

    def fsync(handle: int) -> None:
        _refuse(os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    def written(tensors: dict[str, Any], path: Path) -> None:
        _refuse(str(path))
        save_file(tensors, path)

    os.fsync, checkpoint_format.save_file, _refused = fsync, written, (re.compile(pattern), number)
    try:
        yield
    finally:
        os.fsync, checkpoint_format.save_file, _refused = sync, save_file, None


@contextmanager
def full_disk(size: int = 0) -> Iterator[None]:
    """No file that this process writes may grow (EFBIG): a full disk that needs no mount.

    The first `size` bytes of a file can be written, as where the disk has a little room left.
    Output that pytest captures at the file descriptor cannot grow either: use `capsys`.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _install() -> None:
    global _installed
    if not _installed:
        sys.addaudithook(_hook)
        _installed = True


@contextmanager
def dying_at(
    root: Path,
    at: int | None,
    real: bool = False,
    power_loss: bool = False,
    watch: Callable[[], None] | None = None,
) -> Iterator[_Plan]:
    """Within the block, die before operation number `at` under `root`; `.count` counts them.

    Args:
        at: Number of the operation, from 0; None for never.
        root: Folder of the operations that count.
        real: Whether to kill this process. Otherwise Killed is raised, in every thread.
        power_loss: Whether unsynced data is lost.
        watch: Called before each operation.
    """
    global _plan
    _install()
    sync, save_file = os.fsync, checkpoint_format.save_file
    plan = _Plan(root, at, real, power_loss, watch)

    def fsync(handle: int) -> None:
        plan.operation()
        sync(handle)
        plan.synced(os.readlink(f"/proc/self/fd/{handle}"))

    def written(tensors: dict[str, Any], path: Path) -> None:
        plan.operation()
        plan.wrote(str(path))
        save_file(tensors, path)

    os.fsync, checkpoint_format.save_file, _plan = fsync, written, plan
    try:
        yield plan
    finally:
        os.fsync, checkpoint_format.save_file, _plan = sync, save_file, None
