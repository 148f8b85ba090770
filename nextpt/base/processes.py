"""Processes: identity across machines, liveness, command lines, exit together with ancestors."""

from __future__ import annotations

import ctypes
import multiprocessing
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

from nextpt.base.errors import EXIT_CRASHED

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
LARGEST_PID = 2**31 - 1  # pid_t of Linux
LATEST_TIME = 2**40  # seconds since 1970; a record with a later time is damaged
POLL_SECONDS = 1.0  # between two checks that the ancestors are alive


def start_ticks(pid: int) -> str | None:
    """Start time of a process of this machine, in clock ticks since boot.

    None without such a process.

    Together with the pid it names a process until the next reboot. psutil's create_time() is in
    seconds of the wall clock and moves when the clock is set, so /proc is read here. A process that
    has ended and was not waited for (a zombie) counts as gone.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            # The name of the command stands in parentheses and may hold any character. From the
            # state on; proc(5) counts it as field 3 and the start time as field 22.
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[19] if fields and fields[0] not in "ZX" else None


def is_stopped(pid: int) -> bool:
    """Whether a process of this machine is stopped, as by SIGSTOP or Ctrl-Z."""
    with suppress(psutil.Error):
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    return False


def parent_pid(pid: int) -> int | None:
    """Pid of the parent of a process of this machine; None without such a process."""
    with suppress(psutil.Error):
        return psutil.Process(pid).ppid()
    return None


def child_pids(pid: int) -> list[int]:
    """Pids of the children of a process of this machine."""
    with suppress(psutil.Error):
        return [child.pid for child in psutil.Process(pid).children()]
    return []


def command_line(pid: int) -> str:
    """Command line of a process of this machine; empty without such a process."""
    with suppress(psutil.Error):
        return " ".join(psutil.Process(pid).cmdline())
    return ""


def process_identity() -> dict[str, Any]:
    """Identity of this process among those of all machines, as JSON.

    `machine` names one boot of one kernel and one pid namespace.
    """
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": start_ticks(os.getpid()),
    }


def parse_identity(value: Any) -> dict[str, Any]:
    """Check that a JSON value, which anyone may have written, is one of `process_identity`.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    for key in ("host", "machine"):
        if not isinstance(value.get(key), str):
            raise ValueError(f"{key} is no text")
    if type(value.get("pid")) is not int or not 0 < value["pid"] <= LARGEST_PID:
        raise ValueError("pid is not the number of a process")
    if not isinstance(value.get("started"), str | None):
        raise ValueError("started is no text")
    return value


def is_on_this_machine(identity: dict[str, Any]) -> bool:
    """Whether a process of `process_identity` is, or was, one of this machine."""
    return bool(identity.get("machine") == _machine())


def has_ended(identity: dict[str, Any]) -> bool:
    """Whether a process of `process_identity` is known to have ended.

    That is known of processes of this machine only.
    """
    return is_on_this_machine(identity) and start_ticks(identity["pid"]) != identity["started"]


def exit_with_ancestors(ancestors: list[int], on_exit: Callable[[int], None]) -> None:
    """Watch ancestors, and call `on_exit` with the pid of one that has ended.

    On Linux the kernel kills this process when its parent ends, which works also while this process
    is stopped or inside a library. A thread watches the other ancestors, and the parent where the
    kernel has no such signal. Ancestors that have ended before the call are noticed too.

    Args:
        ancestors: Pids, the parent first.
        on_exit: Called once, in the thread.
    """
    if sys.platform == "linux" and ancestors and ancestors[0] == os.getppid():
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    watched = [(pid, start_ticks(pid)) for pid in ancestors]
    parent = os.getppid()

    def ended_ancestor() -> int | None:
        if not os.path.isdir("/proc/self"):  # such a system shows only a change of the parent
            return parent if os.getppid() != parent else None
        return next((p for p, ticks in watched if ticks is None or start_ticks(p) != ticks), None)

    def watch() -> None:
        while (pid := ended_ancestor()) is None:
            time.sleep(POLL_SECONDS)
        on_exit(pid)

    threading.Thread(target=watch, daemon=True, name="ancestors").start()


def exit_with_parent() -> None:
    """End this process when its parent ends; for children that multiprocessing started."""
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        exit_with_ancestors([parent.pid], lambda pid: os._exit(EXIT_CRASHED))


def open_files() -> Iterator[str]:
    """Paths of the files that processes have open, as far as this user may look."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            yield from (file.path for file in process.open_files())


def mapped_files() -> Iterator[str]:
    """Paths that processes have mapped: shared memory is often closed once it is mapped."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            yield from (area.path for area in process.memory_maps())


def _machine() -> str:
    """One boot of one kernel and one pid namespace; the host name where /proc does not say."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
