"""Being told to stop, by SIGTERM or SIGUSR1 (Slurm: preemption, time limit): the signal is only noted; the loop acts on it.

Python runs handlers between two of its instructions, and not while it waits inside a library. So a
thread of its own reads what the C part of the handler writes, and a second signal ends the process
whatever the first thread does.
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
# Launchers pass one signal on along several ways (Slurm to every step, deepspeed's to all below
# it): within this many seconds it is the same one.
REPEAT = 2.0


class StopRequest:
    """Whether this process was told to stop, by which signal and when (seconds of the monotonic clock)."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.at = 0.0

    def note(self, number: int) -> None:
        """Hear a signal.

        One that comes again, later than launchers repeat it, ends the process at once.
        """
        now = time.monotonic()
        if self.name is None:
            self.at, self.name = now, signal.Signals(number).name
            if os.environ.get("RANK", "0") == "0":
                print(
                    f"{self.name}: saving after this step, then ending; once more ends at once",
                    file=sys.stderr,
                    flush=True,
                )
        elif now - self.at > REPEAT:
            os._exit(EXIT_REQUEUE)

    def seconds_left(self, grace: float) -> float | None:
        """Of the time given; None where no signal came."""
        return None if self.name is None else grace - (time.monotonic() - self.at)


@contextmanager
def listen_for_signals() -> Iterator[StopRequest]:
    """Note signals while the block runs.

    Elsewhere than in the first thread, where signals cannot be had, none comes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = {number: signal.signal(number, lambda number, frame: None) for number in SIGNALS}
    old = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        while data := reader.recv(64):
            for number in data:
                if number in SIGNALS:
                    request.note(number)

    thread = threading.Thread(target=listen, daemon=True, name="signals")
    thread.start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(old)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()
        thread.join()
        reader.close()


def resume_command() -> str:
    """The command that goes on with this run, as a person typed it."""
    typed = os.environ.get("NEXTPT_COMMAND")
    return typed or shlex.join(
        [*_starter(), *(a for a in sys.argv if not a.startswith("--local_rank"))]
    )


def _starter() -> list[str]:
    return ["deepspeed"] if any(a.startswith("--local_rank") for a in sys.argv) else ["python"]
