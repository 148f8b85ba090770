"""Stop signals: SIGTERM and SIGUSR1 (Slurm: preemption, time limit) are recorded for the loop.

Python runs handlers between two of its instructions, and not while it waits inside a library. So a
separate thread reads what the C part of the handler writes, and a second signal ends the process
whatever the main thread does.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from nextpt.base.errors import EXIT_REQUEUE

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Launchers forward one signal several times (Slurm to every step, deepspeed to all its children):
# within this many seconds it counts as the same signal.
REPEAT_SECONDS = 2.0


class StopRequest:
    """The signal that asked this process to stop.

    Attributes:
        signal_name: Name of the signal, None while there was none.
        time: When it came, seconds of the monotonic clock.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.time = 0.0

    def record(self, number: int) -> None:
        """Record a signal; a second one, later than launchers repeat it, ends the process."""
        now = time.monotonic()
        if self.signal_name is None:
            self.time, self.signal_name = now, signal.Signals(number).name
            if os.environ.get("RANK", "0") == "0":
                print(
                    f"{self.signal_name}: saving after this step, then ending; a second signal ends"
                    " at once",
                    file=sys.stderr,
                    flush=True,
                )
        elif now - self.time > REPEAT_SECONDS:
            os._exit(EXIT_REQUEUE)

    def seconds_left(self, grace: float) -> float | None:
        """Seconds left of a grace period that began with the signal; None without a signal."""
        return None if self.signal_name is None else grace - (time.monotonic() - self.time)


@contextmanager
def listen_for_signals() -> Iterator[StopRequest]:
    """Record signals while the block runs.

    Only the main thread can receive signals; in others the request stays empty.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    old_handlers = {number: signal.signal(number, lambda number, frame: None) for number in SIGNALS}
    old_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        while data := reader.recv(64):
            for number in data:
                if number in SIGNALS:
                    request.record(number)

    thread = threading.Thread(target=listen, daemon=True, name="signals")
    thread.start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(old_fd)
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
        writer.close()
        thread.join()
        reader.close()


def resume_command() -> str:
    """The command that resumes this run, as the user typed it."""
    typed = os.environ.get("NEXTPT_COMMAND")
    arguments = [a for a in sys.argv if not a.startswith("--local_rank")]
    return typed or shlex.join([_launcher(), *arguments])


def _launcher() -> str:
    return "deepspeed" if any(a.startswith("--local_rank") for a in sys.argv) else "python"
