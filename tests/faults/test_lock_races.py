"""Run lock, pairs of starts at random offsets and with clocks a day apart: one wins."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from unittest.mock import patch

import pytest

from nextpt.base.errors import RunInUseError
from nextpt.base.processes import is_stopped
from nextpt.job.lock import RunLock

pytestmark = pytest.mark.process

FORK = multiprocessing.get_context("fork")
PAIRS = 100
DAY = 86400.0


def prepare(folder: Path, state: str) -> None:
    """A folder that is new, released, of a dead holder, or of one whose process id was reused."""
    if state == "new":
        return
    lock = RunLock(folder)
    if state == "free":
        lock.release()
        return
    lock._stop.set()
    [path] = folder.glob("lock-*.json")
    holder = json.loads(path.read_text())
    path.write_text(
        json.dumps(holder | ({"pid": 2**22 + 1} if state == "dead" else {"started": "1"}))
    )


def racer(root: Path, number: int, barrier: Barrier) -> None:
    dice, now = random.Random(number), time.time
    for pair in range(PAIRS):
        offset, skew = dice.random() * 0.004, dice.choice((-DAY, 0.0, DAY))
        barrier.wait(300)
        time.sleep(offset)
        with patch.object(time, "time", lambda skew=skew: now() + skew):
            try:
                lock = RunLock(root / str(pair), 0.05, 30.0)
            except RunInUseError:
                lock = None
        (root / f"{pair}-{number}-{'won' if lock else 'refused'}").touch()
        barrier.wait(300)  # the winner holds the lock until the other has been refused
        if lock:
            lock.check()
            lock.release()
        barrier.wait(300)


def test_exactly_one_of_a_pair_wins(tmp_path: Path) -> None:
    for pair in range(PAIRS):
        prepare(tmp_path / str(pair), ("new", "free", "dead", "number")[pair % 4])
    barrier = FORK.Barrier(2)
    racers = [FORK.Process(target=racer, args=(tmp_path, number, barrier)) for number in range(2)]
    for process in racers:
        process.start()
    for process in racers:
        process.join(500)
    assert [process.exitcode for process in racers] == [0, 0]
    outcomes = {
        pair: sorted(p.name.split("-", 1)[1] for p in tmp_path.glob(f"{pair}-*"))
        for pair in range(PAIRS)
    }
    wrong = {
        pair: answers
        for pair, answers in outcomes.items()
        if [f.split("-")[1] for f in answers] not in (["won", "refused"], ["refused", "won"])
    }
    assert not wrong
    winners = {answers[0].endswith("won") for answers in outcomes.values()}
    assert winners == {True, False}, "one of the racers always wins: they do not race"
    assert not [p for p in tmp_path.rglob("*") if ".tmp" in p.name]


def stopped_holder(folder: Path, answers: Path) -> None:
    """Acquires the lock, begins to commit and is stopped there.

    After it continues, it reports whether it may commit, then tries to.
    """
    lock = RunLock(folder, 0.05, 0.3)
    staging = folder / "checkpoints" / ".staging-step-000000001"
    staging.mkdir(parents=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    outcome = "may commit"
    try:
        lock.check()
    except RunInUseError:
        outcome = "fenced"
    try:
        os.rename(staging, folder / "checkpoints" / "step-000000001")
        outcome += ", committed"
    except FileNotFoundError:
        outcome += ", out of reach"
    lock.release()
    answers.write_text(outcome)


@pytest.mark.parametrize("skew", [-DAY, DAY])
def test_one_of_a_pair_takes_over_from_a_suspended_holder_which_is_fenced(
    tmp_path: Path, skew: float
) -> None:
    """Several folders at a time: a lease has to pass in each."""
    folders = [tmp_path / str(n) for n in range(5)]
    holders = [
        FORK.Process(target=stopped_holder, args=(folder, folder.with_suffix(".answer")))
        for folder in folders
    ]
    for holder in holders:
        holder.start()
    while not all(is_stopped(holder.pid) for holder in holders):
        time.sleep(0.01)

    def follow(folder: Path, number: int, barrier: Barrier) -> None:
        time.sleep(random.Random(f"{folder} {number}").random() * 0.05)
        real = time.time
        with patch.object(time, "time", lambda: real() + skew * number):
            try:
                lock = RunLock(folder, 0.05, 0.3)
            except RunInUseError:
                lock = None
        barrier.wait(300)
        if lock:
            folder.with_suffix(f".won-{number}").touch()
            barrier.wait(300)  # the holder has continued and ended
            lock.check()
            lock.release()
        else:
            barrier.wait(300)

    barrier = FORK.Barrier(2 * len(folders) + 1)
    followers = [
        FORK.Process(target=follow, args=(folder, number, barrier))
        for folder in folders
        for number in range(2)
    ]
    for follower in followers:
        follower.start()
    barrier.wait(300)
    for holder in holders:
        os.kill(holder.pid, signal.SIGCONT)
        holder.join(300)
    barrier.wait(300)
    for follower in followers:
        follower.join(300)
    assert [follower.exitcode for follower in followers] == [0] * len(followers)
    assert [len(list(tmp_path.glob(f"{folder.name}.won-*"))) for folder in folders] == [1] * len(
        folders
    )
    assert {folder.with_suffix(".answer").read_text() for folder in folders} == {
        "fenced, out of reach"
    }
