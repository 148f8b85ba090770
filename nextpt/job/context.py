"""Context of one training job: run-folder lock, signal handling, hang watchdog, exit record."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from nextpt.base.collective import RankGroup, run_on_all_ranks, run_on_rank_0
from nextpt.job.exit_record import ExitRecord, record_exit, remove_exit_record
from nextpt.job.lock import RunLock
from nextpt.job.signals import StopRequest, listen_for_signals
from nextpt.job.watchdog import Watchdog


class JobContext:
    """What training reports its progress to, and asks whether to go on.

    Without arguments it watches nothing and never asks to stop.

    Args:
        stop: The signals of this process.
        watchdog: Ends the job when a phase takes too long.
        lock: The lock of the run folder, on the rank that holds it.
        exit_record: Gets the last completed step, on the rank that holds the lock.

    Attributes:
        start: Record of this start in environment.json (see environment.py); checkpoints keep it.
    """

    def __init__(
        self,
        stop: StopRequest | None = None,
        watchdog: Watchdog | None = None,
        lock: RunLock | None = None,
        exit_record: ExitRecord | None = None,
    ) -> None:
        self.stop = stop or StopRequest()
        self.watchdog = watchdog
        self.lock = lock
        self.exit_record = exit_record or ExitRecord()
        self.start: dict[str, Any] = {}

    def set_phase(self, phase: str, step: int) -> None:
        """Begin a phase of the work; the watchdog limits its duration."""
        if self.watchdog:
            self.watchdog.set_phase(phase, step)

    def record_step(self, step: int) -> None:
        """Record that `step` steps are complete."""
        self.exit_record.step = step

    @property
    def step(self) -> int:
        """Number of completed steps."""
        return self.exit_record.step

    @property
    def stop_requested(self) -> bool:
        """Whether this rank received a signal to stop."""
        return self.stop.signal_name is not None

    def check_lock(self) -> None:
        """Check without disk access that this job still holds the run folder.

        Raises:
            RunInUseError: On the rank that held it, when another job has taken it over.
        """
        if self.lock and self.lock.lost:
            self.lock.check()

    def verify_lock(self) -> None:
        """As `check_lock`, by reading the folder: for right before a commit."""
        if self.lock:
            self.lock.check()


@contextmanager
def job_context(run: Path, group: RankGroup, hang_seconds: float) -> Iterator[JobContext]:
    """Hold the run folder and watch every rank while the block runs. Collective.

    Args:
        run: The run folder, which rank 0 locks.
        group: All ranks of the job.
        hang_seconds: Config key train.hang_seconds.

    Raises:
        RunInUseError: On all ranks, when another job works in the folder.
    """
    with listen_for_signals() as stop:
        lock: RunLock | None = None

        def acquire() -> None:
            nonlocal lock
            lock = RunLock(run)
            remove_exit_record(run)

        run_on_rank_0(group, acquire)
        hosts = group.all_gather(platform.node())
        try:
            with record_exit(run) if lock else nullcontext(ExitRecord()) as exit_record:
                watchdog = run_on_all_ranks(
                    group, lambda: Watchdog(run, group.rank, hosts, hang_seconds)
                )
                try:
                    yield JobContext(stop, watchdog, lock, exit_record)
                finally:
                    watchdog.close()
        finally:
            if lock:
                lock.release()
