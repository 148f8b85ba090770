"""Hang watchdog: ends a job that makes no progress and names the rank that is to blame.

Every rank sets its phase (`set_phase`); a thread measures how long the phase has lasted. A phase of
a known name may take `train.hang_seconds` or ten times its median duration, whichever is longer;
the first phase of a name, which may compile or connect, FIRST_SECONDS. A rank past half of its
limit writes a report beside those of the others, again and again. A rank past its limit, or one
that sees that another is, writes the stacks of its threads, waits for the others to do so too,
diagnoses from the reports which rank holds up the others, and ends its process.

Nothing is written while all goes well. A gap in the thread's own time (the whole job was suspended)
is not counted.
"""

from __future__ import annotations

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from nextpt.base.errors import EXIT_HUNG
from nextpt.base.files import atomic_write, canonical_json
from nextpt.base.json_files import read_json
from nextpt.job.exit_record import read_exit_record, write_exit_record

# Limit of the first phase of a name, seconds: the collectives' own time limit
FIRST_SECONDS = 1800.0
# A phase of ten times the median is no longer noise; shorter ones fall under hang_seconds.
MEDIANS = 10
HISTORY = 50  # durations kept per name
# Seconds in which a rank of a busy machine has written that it is past its limit
ANSWER_SECONDS = 4.0
REPORT_KEYS = {"beat", "count", "phase", "in_collective", "location", "expired"}
# Files in whose functions a rank waits for others
COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")


class Watchdog:
    """Watches the thread that constructs it.

    Args:
        run: The run folder; reports and stacks go to its folder `stacks`.
        rank: Rank of this process.
        hosts: Host name of every rank, in order of rank.
        seconds: Config key train.hang_seconds.
    """

    def __init__(self, run: Path, rank: int, hosts: list[str], seconds: float) -> None:
        self.run = run
        self.rank = rank
        self.hosts = hosts
        self.seconds = seconds
        self.tick = min(max(seconds / 20, 0.1), 1.0)
        self.step = 0
        self._durations: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=HISTORY))
        self._phase = "start"
        self._description = "starting"
        self._phase_count = 0
        self._phase_start = time.monotonic()
        self._idle = 0.0  # sum of the thread's own ticks since the phase began
        self._report_count = 0
        self._watched_thread = threading.get_ident()
        self._stop = threading.Event()
        self._folder = run / "stacks"
        for old in (self._report_path(rank), self._stacks_path(rank)):
            old.unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()

    def set_phase(self, phase: str, step: int) -> None:
        """End the current phase and begin another; all ranks do so in the same order."""
        now = time.monotonic()
        self._durations[self._phase].append(now - self._phase_start)
        self._phase, self._description = phase, f"{phase}, step {step}"
        self._phase_start, self.step = now, step
        self._phase_count += 1

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        self._thread.join()
        self._report_path(self.rank).unlink(missing_ok=True)

    def limit(self) -> float:
        """Seconds that the current phase may take."""
        durations = list(self._durations.get(self._phase, ()))
        if not durations:
            return max(FIRST_SECONDS, self.seconds)
        return max(self.seconds, MEDIANS * statistics.median(durations))

    def _watch(self) -> None:
        last_time, last_count = time.monotonic(), self._phase_count
        while not self._stop.wait(self.tick):
            now = time.monotonic()
            if self._phase_count == last_count:
                self._idle += min(now - last_time, 2 * self.tick)
            else:
                self._idle = 0.0
            last_time, last_count = now, self._phase_count
            limit = self.limit()
            if self._idle < limit / 2:
                continue
            with suppress(OSError):
                self._write_report(expired=False)
            # One tick early rather than one late
            if self._idle + self.tick >= limit or any(
                report.get("expired") for report in self._read_reports().values()
            ):
                self._end_process()

    def _end_process(self) -> None:
        with suppress(OSError):
            self._write_stacks()
            self._write_report(expired=True)
        first = self._read_reports()
        self._wait_until(self._all_are_expired)
        last = self._read_reports()
        if self._stop.is_set():
            return
        expired_ranks = (rank for rank in last if last[rank].get("expired"))
        if self.rank == min(expired_ranks, default=self.rank):
            text = (
                f"no progress for {self._idle:.0f} s at {self._description}:"
                f" {diagnose(first, last, self.hosts)}; stacks of all ranks that answer are in"
                f" {self._folder}"
            )
            write_exit_record(self.run, EXIT_HUNG, text, self.step)
            print(f"error: {text}; the same command resumes", file=sys.stderr, flush=True)
        else:
            # A launcher ends all ranks when one ends: the record and the message come first.
            self._wait_until(lambda: read_exit_record(self.run) is not None)
            time.sleep(1)
        os._exit(EXIT_HUNG)

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + ANSWER_SECONDS
        while not condition() and time.monotonic() < deadline:
            time.sleep(self.tick / 2)

    def _all_are_expired(self) -> bool:
        reports = self._read_reports()
        return len(reports) == len(self.hosts) and all(r["expired"] for r in reports.values())

    def _write_stacks(self) -> None:
        self._folder.mkdir(exist_ok=True)
        with atomic_write(self._stacks_path(self.rank)) as file:
            file.write(
                f"rank {self.rank} on {self.hosts[self.rank]}, process {os.getpid()}, at"
                f" {self._description}\n\n"
            )
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _write_report(self, expired: bool) -> None:
        self._folder.mkdir(exist_ok=True)
        self._report_count += 1
        in_collective, location = self._locate()
        report = {
            "beat": self._report_count,
            "count": self._phase_count,
            "phase": self._description,
            "in_collective": in_collective,
            "location": location,
            "expired": expired,
        }
        with atomic_write(self._report_path(self.rank)) as file:
            file.write(canonical_json(report))

    def _locate(self) -> tuple[bool, str]:
        """Whether the watched thread is inside a collective, and its innermost line of our code."""
        frame = sys._current_frames().get(self._watched_thread)
        in_collective, location = False, ""
        while frame is not None:
            name = frame.f_code.co_filename
            in_collective = in_collective or any(part in name for part in COLLECTIVES)
            if not location and "site-packages" not in name:
                location = f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
            frame = frame.f_back
        return in_collective, location

    def _report_path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.json"

    def _stacks_path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.txt"

    def _read_reports(self) -> dict[int, dict[str, Any]]:
        reports = {}
        for rank in range(len(self.hosts)):
            with suppress(OSError, ValueError):
                report = read_json(self._report_path(rank))
                if isinstance(report, dict) and report.keys() >= REPORT_KEYS:
                    reports[rank] = report
        return reports


def diagnose(
    first: dict[int, dict[str, Any]], last: dict[int, dict[str, Any]], hosts: list[str]
) -> str:
    """Say which ranks hold up the others, from the reports at two moments.

    The first of these that applies: ranks without a report, or whose report did not change between
    the two moments; ranks in an earlier phase than others; ranks that are not inside a collective
    while others are; else all ranks wait for each other.

    Args:
        first: Reports by rank, as `Watchdog` writes them.
        last: The same, a little later.
        hosts: Host name of every rank, in order of rank.
    """
    silent = [
        rank
        for rank in range(len(hosts))
        if rank not in last
        or (not last[rank]["expired"] and last[rank]["beat"] == first.get(rank, {}).get("beat"))
    ]
    if silent:
        return (
            f"{_names(silent, hosts)} shows no sign of life (stopped, or cut off from the others)"
        )
    newest_phase = max(report["count"] for report in last.values())
    behind = [rank for rank, report in last.items() if report["count"] < newest_phase]
    if behind:
        report = last[behind[0]]
        return (
            f"{_names(behind, hosts)} is behind the others, at {report['phase']},"
            f" {report['location']}"
        )
    busy = [rank for rank, report in last.items() if not report["in_collective"]]
    if (busy and len(busy) < len(last)) or len(hosts) == 1:
        busy = busy or [0]
        return (
            f"{_names(busy, hosts)} does not come to where the others wait; it is at"
            f" {last[busy[0]]['location']}"
        )
    if busy:
        return "all ranks are busy, none waits for another"
    return "all ranks wait for each other; the network between them may be cut"


def _names(ranks: list[int], hosts: list[str]) -> str:
    names = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks[:4])
    return names + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
