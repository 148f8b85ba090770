"""What surrounds the training of a job: it alone works in the folder, hears signals, is watched, and records its end."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from nextpt.base.collective import RankGroup, run_on_all_ranks, run_on_rank_0
from nextpt.job.exit_record import Progress, record_exit, remove_exit_record
from nextpt.job.lock import RunLock
from nextpt.job.signals import StopRequest, listen_for_signals
from nextpt.job.watchdog import Watchdog


class JobContext:
    """What the loop tells and asks. Built with nothing, it never ends a loop."""

    def __init__(
        self,
        stop: StopRequest | None = None,
        watchdog: Watchdog | None = None,
        lock: RunLock | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.stop = stop or StopRequest()
        self.watchdog = watchdog
        self.lock = lock
        self.progress = progress or Progress()

    def set_phase(self, kind: str, step: int) -> None:
        """Hear what is being done from now on."""
        if self.watchdog:
            self.watchdog.set_phase(kind, step)

    def record_step(self, step: int) -> None:
        """Hear that a step was made."""
        self.progress.step = step

    def stop_requested(self) -> bool:
        """Whether this rank was."""
        return self.stop.name is not None

    def check(self) -> None:
        """Raises RunInUseError on the rank that held the run folder when another job has taken it.

        Costs nothing.
        """
        if self.lock and self.lock.lost:
            self.lock.check()

    def may_commit(self) -> None:
        """The same right before a checkpoint gets its name, by looking at the folder."""
        if self.lock:
            self.lock.check()


@contextmanager
def job_context(run: Path, ranks: RankGroup, hang_seconds: float) -> Iterator[JobContext]:
    """Take the run folder and watch the block on every rank, then let go.

    Collective. Raises RunInUseError on all ranks.
    """
    taken: list[RunLock] = []

    def take() -> None:
        taken.append(RunLock(run))
        remove_exit_record(run)

    with listen_for_signals() as stop:
        run_on_rank_0(ranks, take)
        lock = taken[0] if taken else None
        hosts = ranks.all_gather(platform.node())
        try:
            with record_exit(run) if lock else nullcontext(Progress()) as progress:
                watchdog = run_on_all_ranks(
                    ranks, lambda: Watchdog(run, ranks.rank, hosts, hang_seconds)
                )
                try:
                    yield JobContext(stop, watchdog, lock, progress)
                finally:
                    watchdog.close()
        finally:
            if lock:
                lock.release()
