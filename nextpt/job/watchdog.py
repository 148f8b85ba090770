"""Ending a job that makes no progress, and saying which rank is to blame.

Every rank says what it does now (`doing`); a thread looks at how long it has been doing it. A kind
of work that was done before may take HANG seconds or ten times its median, whichever is longer; the
first of a kind, which may compile or connect, FIRST. A rank past half of that writes a report
beside those of the others, again and again; one past all of it, or one that sees another there,
writes the stacks of its threads, waits for the others to do so too, judges, and ends.

Nothing is written while all goes well. A gap in the thread's own time (the whole job was suspended)
is not counted.
"""

from __future__ import annotations

import faulthandler
import json
import os
import statistics
import sys
import threading
import time
from collections import defaultdict, deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from nextpt.base.errors import EXIT_HUNG
from nextpt.base.files import atomic_write, canonical_json
from nextpt.job.exit_record import write_exit_record

FIRST = 1800.0  # seconds for the first of a kind of work: the collectives' own time limit
# A stall of ten times the usual is no longer noise; shorter ones fall under hang_seconds
MEDIANS = 10
REMEMBERED = 50  # durations of each kind
COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")  # where a rank waits for others


class Watchdog:
    """Watches the thread that makes it. hosts: of all ranks, to name them. seconds: config key train.hang_seconds."""

    def __init__(self, run: Path, rank: int, hosts: list[str], seconds: float) -> None:
        self.run, self.rank, self.hosts, self.seconds = run, rank, hosts, seconds
        self.tick = min(max(seconds / 20, 0.1), 1.0)
        self.step = 0
        self._durations: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._kind, self._text, self._count = "start", "starting", 0
        self._idle = 0.0  # of the thread's own ticks, since it saw the count move
        self._began = time.monotonic()
        self._watched, self._beat, self._stop = threading.get_ident(), 0, threading.Event()
        self._folder = run / "stacks"
        for old in (self._report_of(rank), self._stacks_of(rank)):
            old.unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()

    def set_phase(self, kind: str, step: int) -> None:
        """Hear that work of a kind begins (and what was being done has ended).

        All ranks say the same in the same order.
        """
        now = time.monotonic()
        self._durations[self._kind].append(now - self._began)
        self._kind, self._text, self._began, self.step = kind, f"{kind}, step {step}", now, step
        self._count += 1

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._report_of(self.rank).unlink(missing_ok=True)

    def limit(self) -> float:
        """Seconds that what is being done may take."""
        known = list(self._durations.get(self._kind, ()))
        return (
            max(self.seconds, MEDIANS * statistics.median(known))
            if known
            else max(FIRST, self.seconds)
        )

    def _watch(self) -> None:
        before, seen = time.monotonic(), self._count
        while not self._stop.wait(self.tick):
            now = time.monotonic()
            self._idle = (
                self._idle + min(now - before, 2 * self.tick) if self._count == seen else 0.0
            )
            before, seen = now, self._count
            limit = self.limit()
            if self._idle < limit / 2:
                continue
            with suppress(OSError):
                self._report(fired=False)
            # One tick early rather than one late.
            if self._idle + self.tick >= limit or any(
                r.get("fired") for r in self._reports().values()
            ):
                self._end()

    def _end(self) -> None:
        with suppress(OSError):
            self._dump()
            self._report(fired=True)
        first = self._reports()
        time.sleep(3 * self.tick + 1)  # for the others to write theirs
        last = self._reports()
        if self._stop.is_set():
            return
        speaks = self.rank == min((r for r in last if last[r].get("fired")), default=self.rank)
        if speaks:
            verdict = diagnose(first, last, self.hosts)
            text = (
                f"no progress for {self._idle:.0f} s at {self._text}: {verdict}; stacks of all"
                f" ranks that answer are in {self._folder}"
            )
            write_exit_record(self.run, EXIT_HUNG, text, self.step)
            print(f"error: {text}; the same command resumes", file=sys.stderr, flush=True)
        else:
            time.sleep(1)  # a launcher ends all when one ends: the one that speaks comes first
        os._exit(EXIT_HUNG)

    def _dump(self) -> None:
        self._folder.mkdir(exist_ok=True)
        with open(self._stacks_of(self.rank), "w", encoding="utf-8") as file:
            file.write(
                f"rank {self.rank} on {self.hosts[self.rank]}, process {os.getpid()}, at"
                f" {self._text}\n\n"
            )
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _report(self, fired: bool) -> None:
        self._folder.mkdir(exist_ok=True)
        self._beat += 1
        waits, place = self._where()
        with atomic_write(self._report_of(self.rank)) as file:
            file.write(
                canonical_json(
                    {
                        "beat": self._beat,
                        "count": self._count,
                        "doing": self._text,
                        "waits": waits,
                        "place": place,
                        "fired": fired,
                    }
                )
            )

    def _where(self) -> tuple[bool, str]:
        """Whether the watched thread is inside a collective, and the innermost line of ours or of a caller of ours."""
        frame, waits, place = sys._current_frames().get(self._watched), False, ""
        while frame is not None:
            name = frame.f_code.co_filename
            waits = waits or any(part in name for part in COLLECTIVES)
            if not place and "site-packages" not in name:
                place = f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
            frame = frame.f_back
        return waits, place

    def _report_of(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.json"

    def _stacks_of(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.txt"

    def _reports(self) -> dict[int, dict[str, Any]]:
        found = {}
        for rank in range(len(self.hosts)):
            with suppress(OSError, ValueError):
                found[rank] = json.loads(self._report_of(rank).read_text(encoding="utf-8"))
        return found


def diagnose(
    first: dict[int, dict[str, Any]], last: dict[int, dict[str, Any]], hosts: list[str]
) -> str:
    """Who holds up whom, from two looks at the reports of the ranks (rank -> what `Watchdog` writes).

    In this order: ranks whose report is missing, or did not move between the looks; ranks that are
    behind the others; ranks that are not inside a collective while others are; else all wait for
    each other.
    """
    silent = [
        r
        for r in range(len(hosts))
        if r not in last
        or (not last[r]["fired"] and last[r]["beat"] == first.get(r, {}).get("beat"))
    ]
    if silent:
        return (
            f"{_names(silent, hosts)} shows no sign of life (stopped, or cut off from the others)"
        )
    counts = {r: last[r]["count"] for r in last}
    behind = [r for r in counts if counts[r] < max(counts.values())]
    if behind:
        return (
            f"{_names(behind, hosts)} is behind the others, at {last[behind[0]]['doing']},"
            f" {last[behind[0]]['place']}"
        )
    busy = [r for r in last if not last[r]["waits"]]
    if (busy and len(busy) < len(last)) or len(hosts) == 1:
        return (
            f"{_names(busy or [0], hosts)} does not come to where the others wait; it is at"
            f" {last[(busy or [0])[0]]['place']}"
        )
    return (
        "all ranks wait for each other; the network between them may be cut"
        if not busy
        else "all ranks are busy, none waits for another"
    )


def _names(ranks: list[int], hosts: list[str]) -> str:
    named = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks[:4])
    return named + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
