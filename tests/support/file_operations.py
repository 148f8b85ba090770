"""Death at a chosen file operation: of this process for good, or of what it does, as if it had been killed there.

Seen by an audit hook, so nothing goes past it: opening to write, renaming, removing, making folders; and syncing and the
writing of tensor files, which have no audit event. What was not synced at the moment of death is torn: a file that was
about to be synced keeps half of its bytes, as after a power loss.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nextpt.checkpoint import format as checkpoint_format

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
TOUCHES = CHANGES | {"open", "os.listdir", "os.scandir", "shutil.rmtree"}


class Killed(BaseException):
    """Stands for SIGKILL: no `except Exception` catches it, and whatever tries a file operation afterwards dies too."""


class _Plan:
    def __init__(self, root: Path, at: int | None, real: bool, watch: Callable[[], None] | None) -> None:
        self.root, self.at, self.real, self.watch = str(root), at, real, watch
        self.count, self.dead, self.paused = 0, False, False

    def operation(self, tear: Callable[[], None] | None = None) -> None:
        """Called before each operation that changes something."""
        if self.dead:
            raise Killed
        if self.watch:
            self.aside(self.watch)
        if self.count == self.at:
            if tear:
                self.aside(tear)
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


_plan: _Plan | None = None
_installed = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    plan = _plan
    if plan is None or plan.paused or event not in TOUCHES:
        return
    if plan.dead:
        raise Killed
    path, *rest = arguments
    writes = event == "open" and rest[1] & (os.O_WRONLY | os.O_RDWR)
    if (event in CHANGES or writes) and (plan.root in str(path) or not os.path.isabs(str(path))):
        plan.operation()


def _tear(path: str) -> None:
    if os.path.isfile(path):
        os.truncate(path, os.path.getsize(path) // 2)


@contextmanager
def dying_at(root: Path, at: int | None, real: bool = False, watch: Callable[[], None] | None = None) -> Iterator[_Plan]:
    """Within the block, die before operation number `at` (from 0; None: never) under `root`; `.count` counts them.

    real: this process is killed; otherwise Killed is raised, in every thread. watch: called before each operation.
    """
    global _plan, _installed
    if not _installed:
        sys.addaudithook(_hook)
        _installed = True
    sync, save_file = os.fsync, checkpoint_format.save_file
    plan = _Plan(root, at, real, watch)

    def fsync(handle: int) -> None:
        path = f"/proc/self/fd/{handle}"
        plan.operation(lambda: _tear(path))
        sync(handle)

    def written(tensors: dict[str, Any], path: Path) -> None:
        plan.operation()
        save_file(tensors, path)
        plan.operation(lambda: _tear(str(path)))

    os.fsync, checkpoint_format.save_file, _plan = fsync, written, plan
    try:
        yield plan
    finally:
        os.fsync, checkpoint_format.save_file, _plan = sync, save_file, None


def in_a_child(action: Callable[[], None]) -> int:
    """Run in a forked process; returns its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 70
        signal.alarm(60)
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
