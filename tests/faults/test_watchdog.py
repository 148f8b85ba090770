"""Watchdog: the rank that hangs and the time limits of phases, in threads and forked ranks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from nextpt.base.processes import is_stopped
from nextpt.job.exit_record import read_exit_record
from nextpt.job.watchdog import FIRST_SECONDS, Watchdog, diagnose

FORK = multiprocessing.get_context("fork")
HOSTS = ["node1", "node1", "node2", "node2"]


def report(
    beat: int = 1, count: int = 7, in_collective: bool = True, expired: bool = True
) -> dict[str, Any]:
    return {
        "beat": beat,
        "count": count,
        "phase": "training, step 3",
        "in_collective": in_collective,
        "location": "loop.py:9 step",
        "expired": expired,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({2: None}, "rank 2 on node2 shows no sign of life"),
        ({1: {"expired": False}}, "rank 1 on node1 shows no sign of life"),
        (
            {1: {"count": 6}, 3: {"count": 6}},
            (
                "rank 1 on node1, rank 3 on node2 is behind the others, at training, step 3,"
                " loop.py:9 step"
            ),
        ),
        (
            {3: {"in_collective": False}},
            "rank 3 on node2 does not come to where the others wait; it is at loop.py:9 step",
        ),
        ({}, "all ranks wait for each other; the network between them may be cut"),
        ({r: {"in_collective": False} for r in range(4)}, "all ranks are busy"),
    ],
)
def test_the_rank_that_hangs_is_named(
    changes: dict[int, dict[str, Any] | None], message: str
) -> None:
    reports = {
        r: report() | (changes.get(r, {}) or {}) for r in range(4) if changes.get(r, {}) is not None
    }
    assert diagnose(reports, reports, HOSTS).startswith(message)


def test_a_rank_whose_report_changes_is_alive() -> None:
    first = {r: report(expired=r > 0, beat=1) for r in range(4)}
    last = {r: report(expired=r > 0, beat=2) for r in range(4)}
    assert "wait for each other" in diagnose(first, last, HOSTS)


def test_a_phase_may_last_ten_medians_and_its_first_time_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    watchdog = Watchdog(tmp_path, 0, ["here"], 60.0)
    watchdog.close()
    for step in range(9):
        watchdog.set_phase("training", step)
        assert watchdog.limit() == (FIRST_SECONDS if step == 0 else 90.0)
        clock[0] += 9.0
        watchdog.set_phase("voting", step)
        assert watchdog.limit() == (FIRST_SECONDS if step == 0 else 60.0)
        clock[0] += 0.001


def hang(run: Path, rank: int, barrier: Barrier) -> None:
    """Two turns of work, then rank 0 waits and the last rank does not come."""
    ranks = barrier.parties
    barrier.wait(300)
    watchdog = Watchdog(run, rank, [f"node{r}" for r in range(ranks)], 1.0)
    for step in (1, 2, 3):
        watchdog.set_phase("batches", step)
        if rank == ranks - 1 and step == 3:
            never_comes()
        watchdog.set_phase("the vote", step)
        time.sleep(0.05)
    time.sleep(600)


def never_comes() -> None:
    time.sleep(600)


@pytest.mark.process
def test_a_rank_that_is_behind_is_named_and_all_end_with_their_stacks_written(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    barrier = FORK.Barrier(3)
    ranks = [FORK.Process(target=hang, args=(tmp_path, rank, barrier)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(300)
    assert [rank.exitcode for rank in ranks] == [76] * 3
    assert capfd.readouterr().err.count("error: no progress") == 1
    record = read_exit_record(tmp_path)
    assert record["code"] == 76 and record["step"] == 3, record
    assert (
        "rank 2 on node2 is behind the others, at batches, step 3," in record["reason"]
        and "never_comes" in record["reason"]
    )
    assert all((tmp_path / "stacks" / f"rank-{rank}.txt").exists() for rank in range(3))
    assert "in never_comes" in (tmp_path / "stacks" / "rank-2.txt").read_text()


def test_nothing_is_written_while_training_makes_progress(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, 0, ["here"], 20.0)
    watchdog.tick = 0.05
    for step in range(20):
        watchdog.set_phase("training", step)
        time.sleep(0.05)
    watchdog.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_a_job_that_was_suspended_as_a_whole_continues(tmp_path: Path) -> None:
    """The clock says that the suspension took an hour; the limit of a phase is a minute."""
    suspended = FORK.Value("d", 0.0)  # seconds

    def work() -> None:
        real = time.monotonic
        with patch.object(time, "monotonic", lambda: real() + suspended.value):
            watchdog = Watchdog(tmp_path, 0, ["here"], 60.0)
            watchdog.tick = 0.05
            watchdog.set_phase("training", 1)
            watchdog.set_phase("training", 2)
            (tmp_path / "ready").touch()
            while not suspended.value:
                time.sleep(0.01)
            idle = watchdog._idle
            while watchdog._idle < idle + 8 * watchdog.tick:  # some ticks, without progress
                time.sleep(0.01)
            watchdog.set_phase("training", 3)
            watchdog.close()

    process = FORK.Process(target=work)
    process.start()
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    while not is_stopped(process.pid):
        time.sleep(0.01)
    suspended.value = 3600.0
    os.kill(process.pid, signal.SIGCONT)
    process.join(300)
    assert process.exitcode == 0 and not list(tmp_path.glob("stacks/*.txt"))
