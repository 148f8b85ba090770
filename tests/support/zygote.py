"""Zygote: ranks forked from one process that has imported everything, to start in a second.

What runs in a rank is launcher/run.py's main, as under any launcher. The forking process must not
have threads.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from nextpt.base.processes import child_pids
from tests.support.ports import free_port

PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h
# What torch and deepspeed import when an engine is built, with hundreds of modules below.
LATE = (
    "setuptools",
    "deepspeed.runtime.zero.muon.original_muon",
    "torch._dynamo",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
)
LONGEST = 1500  # seconds after which the kernel ends a rank that is still running


def restart_single_threaded(module: str) -> None:
    """Start this process again, as `python -m MODULE`, if libraries may have started threads in it.

    For the first line of a main.
    """
    if os.environ.get("OMP_NUM_THREADS") != "1":
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]])


def import_training() -> None:
    """Import what a training job imports, also what it imports late. Before the first fork."""
    import torch

    import launcher.run  # noqa: F401
    import nextpt.observe.trackers
    import nextpt.train.run  # noqa: F401

    for name in LATE:
        importlib.import_module(name)
    torch.set_num_threads(1)
    # pyarrow's allocator has a thread, and stops it itself around a fork.
    names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    assert sum(name != "jemalloc_bg_thd" for name in names) == 1, (
        f"a process with the threads {names} must not fork"
    )


def become_subreaper() -> None:
    """Become the parent of orphaned descendants, so that `orphans` sees them."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def orphans() -> list[int]:
    """Processes below this one, those that ended and were not waited for left out."""
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                return child_pids(os.getpid())
        except ChildProcessError:
            return []


class Job:
    """The ranks of one start, forked on construction; output goes to `log`.

    prepare(rank, send): called in each rank before it starts; send(byte) adds a byte to `messages`,
    from any thread.
    """

    def __init__(
        self,
        arguments: list[str],
        ranks: int,
        log: Path,
        prepare: Callable[[int, Callable[[int], object]], None] = lambda rank, send: None,
    ) -> None:
        self.log, self.codes = log, {}
        self.messages: list[tuple[float, int]] = []  # (monotonic time of arrival, byte)
        self._pipe, writer = os.pipe()
        os.set_blocking(self._pipe, False)
        port = free_port()
        sys.stdout.flush()
        sys.stderr.flush()
        self.began = time.time()
        self.pids = [
            self._fork(arguments, rank, ranks, port, writer, prepare) for rank in range(ranks)
        ]
        os.close(writer)

    def _fork(
        self, arguments: list[str], rank: int, ranks: int, port: int, writer: int, prepare: Callable
    ) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 70
        try:
            signal.alarm(LONGEST)
            os.close(self._pipe)
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(ranks),
                LOCAL_SIZE=str(ranks),
                LOCAL_WORLD_SIZE=str(ranks),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
            file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os.close(file)
            sys.argv[:] = ["launcher/run.py", *arguments]
            prepare(rank, lambda byte: os.write(writer, bytes([byte])))
            from launcher.run import main

            code = main(arguments)
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def listen(self, until: float, enough: Callable[[], bool] = lambda: False) -> bool:
        """Read messages until a moment (monotonic) or until `enough` is true.

        False when all ranks ended before.
        """
        while not enough():
            remaining = until - time.monotonic()
            if remaining <= 0:
                return True
            if select.select([self._pipe], [], [], remaining)[0]:
                data = os.read(self._pipe, 4096)
                self.messages += [(time.monotonic(), byte) for byte in data]
                if not data:
                    return False
        return True

    def count(self, *bytes_: int) -> int:
        """Number of messages with one of these bytes."""
        return sum(byte in bytes_ for _, byte in self.messages)

    def kill(self, ranks: list[int]) -> None:
        """Send SIGKILL to one rank after the other; skips ranks that have ended."""
        for rank in ranks:
            if (
                rank not in self.codes
                and os.waitid(os.P_PID, self.pids[rank], os.WEXITED | os.WNOHANG | os.WNOWAIT)
                is None
            ):
                os.kill(self.pids[rank], signal.SIGKILL)

    def wait(self, seconds: float = LONGEST) -> list[int] | None:
        """Exit codes, negative for a signal; None if a rank still runs after `seconds`."""
        deadline = time.monotonic() + seconds
        pause = 0.001
        while True:
            for rank, pid in enumerate(self.pids):
                if rank not in self.codes:
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    if ended:
                        self.codes[rank] = os.waitstatus_to_exitcode(status)
            if len(self.codes) == len(self.pids):
                return [self.codes[rank] for rank in range(len(self.pids))]
            if time.monotonic() > deadline:
                return None
            time.sleep(pause)
            pause = min(pause * 1.5, 0.02)

    def close(self) -> None:
        """Read the last messages and close the pipe. Call after `wait`."""
        self.listen(time.monotonic() + 5)
        os.close(self._pipe)
