"""Which process is which, here and on other machines, and ending with the processes that one was started by."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psutil

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
POLL = 1.0  # seconds between looks at ancestors


def start_of(pid: int) -> str | None:
    """When a process of this machine began, None when there is none: with its number it names a process until a reboot.

    In clock ticks since boot, which no change of the wall clock moves; what has ended and was not
    waited for is gone too.
    """
    fields = _stat(pid)
    return fields[19] if fields and fields[0] not in "ZX" else None


def is_stopped(pid: int) -> bool:
    """Whether a process of this machine is stopped, as by SIGSTOP or Ctrl-Z."""
    fields = _stat(pid)
    return fields is not None and fields[0] in "Tt"


def parent_of(pid: int) -> int | None:
    """Number of the parent of a process of this machine."""
    fields = _stat(pid)
    return int(fields[1]) if fields else None


def children_of(pid: int) -> list[int]:
    """Numbers of the children of a process of this machine."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc/self") else []):
        if parent_of(int(name)) == pid:
            found.append(int(name))
    return found


def identity() -> dict[str, Any]:
    """Names this process among those of all machines. machine: one boot of one kernel, and one space of process numbers."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": start_of(os.getpid()),
    }


def is_here(owner: dict[str, Any]) -> bool:
    """Whether a process that `identity` names is, or was, one of this machine."""
    return owner.get("machine") == _machine()


def is_gone(owner: dict[str, Any]) -> bool:
    """Whether a process that `identity` names is known to have ended: only of this machine is that known."""
    return is_here(owner) and start_of(owner["pid"]) != owner["started"]


def end_with(ancestors: list[int], gone: Callable[[int], None]) -> None:
    """Call gone(pid) when one of the ancestors (parent first) has ended.

    The kernel kills this process with its parent.

    The kernel's way works also while this process is stopped or inside a library; a thread looks
    for the others, and for the parent where the kernel has no such way. Ancestors that are dead
    already are noticed too.
    """
    if sys.platform == "linux" and ancestors and ancestors[0] == os.getppid():
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    known = [(pid, start_of(pid)) for pid in ancestors]
    parent = os.getppid()

    def lost() -> int | None:
        if not os.path.isdir("/proc/self"):  # a system that tells of the parent only
            return parent if os.getppid() != parent else None
        return next((pid for pid, began in known if began is None or start_of(pid) != began), None)

    def watch() -> None:
        while (pid := lost()) is None:
            time.sleep(POLL)
        gone(pid)

    threading.Thread(target=watch, daemon=True, name="ancestors").start()


def command_of(pid: int) -> str:
    """The command line of a process of this machine; empty when there is none."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def open_files() -> Iterator[str]:
    """Paths of the files that processes we may look at have open."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            yield from (file.path for file in process.open_files())


def mapped_files() -> Iterator[str]:
    """Paths that processes we may look at have mapped: shared memory is often closed once it is mapped."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            yield from (area.path for area in process.memory_maps())


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on (proc(5) counts it as the third)."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return None


def _machine() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
