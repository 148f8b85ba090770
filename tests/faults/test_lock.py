"""Run lock: races, dead and suspended holders, holders on other machines, fencing."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

import nextpt.job.lock as lock_module
from nextpt.base.errors import RunInUseError, UserError
from nextpt.base.processes import is_stopped
from nextpt.job.lock import RunLock
from tests.support.file_operations import full_disk

FORK = multiprocessing.get_context("fork")


def newest(folder: Path) -> Path:
    return max(folder.glob("lock-*.json"), key=lambda p: int(p.stem[5:]))


def rewrite(folder: Path, **changes: object) -> None:
    path = newest(folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def hold_in_another_process(folder: Path, heartbeat: float = 0.1) -> multiprocessing.Process:
    """A process that holds the lock until it is ended."""

    def hold() -> None:
        RunLock(folder, heartbeat, 1.0)
        (folder / "held").touch()
        time.sleep(600)

    process = FORK.Process(target=hold)
    process.start()
    while not (folder / "held").exists():
        time.sleep(0.01)
    return process


def test_the_second_is_refused_with_host_process_job_and_age(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    lock = RunLock(tmp_path, heartbeat=3600)  # a beat would write over what follows
    rewrite(tmp_path, since=time.time() - 600)
    before = sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir())
    with pytest.raises(
        RunInUseError,
        match=(
            rf"process {os.getpid()} on {os.uname().nodename}, Slurm job 4711, which started 10"
            r" min ago"
        ),
    ):
        RunLock(tmp_path)
    assert sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir()) == before
    lock.release()
    second = RunLock(tmp_path)
    assert second.token == lock.token + 1 and len(list(tmp_path.glob("lock-*"))) == 1
    second.release()


@pytest.mark.process
def test_the_lock_of_a_dead_holder_passes_on_at_once(tmp_path: Path) -> None:
    process = hold_in_another_process(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    old_name = newest(tmp_path).name
    lock = RunLock(tmp_path, lease=3600)
    assert newest(tmp_path).name == f"lock-{lock.token}.json" != old_name
    lock.release()


def test_a_reused_process_id_is_not_the_holder(tmp_path: Path) -> None:
    RunLock(tmp_path)._stop.set()
    rewrite(tmp_path, started="1")
    lock = RunLock(tmp_path, lease=3600)
    assert lock.token == 2 and newest(tmp_path).name == "lock-2.json"
    lock.release()


def test_a_remote_holder_is_alive_while_its_heartbeat_changes_whatever_the_clocks(
    tmp_path: Path,
) -> None:
    lock = RunLock(tmp_path, heartbeat=0.1)
    lock._content |= {"machine": "another", "since": time.time() + 86400}
    while json.loads(newest(tmp_path).read_text())["machine"] != "another":
        time.sleep(0.01)
    os.utime(newest(tmp_path), (0, 0))
    with pytest.raises(RunInUseError, match="0 min ago"):
        RunLock(tmp_path, lease=120)
    lock._stop.set()
    lock._thread.join()
    second = RunLock(tmp_path, lease=0.3)
    with pytest.raises(RunInUseError, match="was taken over by process"):
        lock.check()
    second.release()


@pytest.mark.process
def test_a_suspended_holder_loses_the_lock_and_cannot_commit(tmp_path: Path) -> None:
    """Its staging folder was moved away, and the check before the commit fails."""

    def hold() -> None:
        lock = RunLock(tmp_path, 0.1, 1.0)
        staging = tmp_path / "checkpoints" / ".staging-step-000000001"
        staging.mkdir(parents=True)
        os.kill(os.getpid(), signal.SIGSTOP)
        answers = []
        try:
            lock.check()
        except RunInUseError:
            answers.append("refused")
        try:
            os.rename(staging, tmp_path / "checkpoints" / "step-000000001")
        except FileNotFoundError:
            answers.append("out of reach")
        lock.release()
        (tmp_path / "answers").write_text(" ".join(answers))

    process = FORK.Process(target=hold)
    process.start()
    while not is_stopped(process.pid):
        time.sleep(0.01)
    second = RunLock(tmp_path, 0.1, 0.5)
    os.kill(process.pid, signal.SIGCONT)
    process.join(300)
    assert (tmp_path / "answers").read_text() == "refused out of reach"
    second.check()
    with pytest.raises(RunInUseError):
        RunLock(tmp_path)
    second.release()


@pytest.mark.process
@pytest.mark.parametrize("state", ["new", "dead", "free"])
def test_one_of_many_racing_starts_wins(tmp_path: Path, state: str) -> None:
    """Six processes, ten rounds: exactly one at a time holds the lock, and one always gets it."""
    racers, rounds = 6, 10

    def race(barrier: Barrier, number: int) -> None:
        for turn in range(rounds):
            folder = tmp_path / str(turn)
            barrier.wait(300)
            try:
                lock = RunLock(folder, 5.0, 30.0)
            except RunInUseError:
                continue
            lock.check()
            os.mkdir(folder / "inside")  # fails if another process holds the lock
            (folder / f"won-{number}").touch()
            time.sleep(0.02)
            lock.check()
            os.rmdir(folder / "inside")
            lock.release()

    for turn in range(rounds):
        if state == "dead":
            lock = RunLock(tmp_path / str(turn))
            lock._stop.set()
            rewrite(tmp_path / str(turn), started="1")
        elif state == "free":
            RunLock(tmp_path / str(turn)).release()
    barrier = FORK.Barrier(racers)
    processes = [FORK.Process(target=race, args=(barrier, n)) for n in range(racers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(500)
    assert [p.exitcode for p in processes] == [0] * racers
    assert all(list((tmp_path / str(turn)).glob("won-*")) for turn in range(rounds))


def test_a_holder_notices_that_it_lost_the_lock(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, heartbeat=0.05)
    assert not lock.lost
    (tmp_path / "lock-8.json").write_text("{}")
    lock._thread.join(300)
    assert lock.lost
    lock.release()
    assert (tmp_path / "lock-8.json").read_text() == "{}"


def test_a_torn_lock_file_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "lock-3.json").write_text("{")
    lock = RunLock(tmp_path, lease=0.2)
    assert lock.token == 4
    lock.release()


DAMAGES = {
    "no pid": {"pid": None},
    "since is text": {"since": "yesterday"},
    "since is far": {"since": 1e308},
    "held is text": {"held": "no"},
    "machine is a number": {"machine": 7},
}


@pytest.mark.parametrize("damage", [*DAMAGES, "nested", "pipe", "link", "folder", "empty"])
def test_a_lock_that_cannot_be_read_is_waited_for_with_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    RunLock(tmp_path)._stop.set()
    path = newest(tmp_path)
    if damage in DAMAGES:
        rewrite(tmp_path, **DAMAGES[damage])
    else:
        path.unlink()
        if damage == "pipe":
            os.mkfifo(path)
        elif damage == "link":
            path.symlink_to("/dev/zero")
        elif damage == "folder":
            path.mkdir()
        else:
            path.write_text("[" * 200_000 if damage == "nested" else "")
    lock = RunLock(tmp_path, lease=0.2)
    assert lock.token == 2
    lock.release()
    assert capsys.readouterr().err == (
        f"run folder {tmp_path} is held by another job (lock-1.json cannot be read); waiting up to"
        " 0 s for a sign of life\n"
    )


def test_a_start_that_waits_says_for_whom_and_how_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RunLock(tmp_path)._stop.set()
    rewrite(tmp_path, machine="another", host="node-7", pid=99, since=time.time() - 600)
    RunLock(tmp_path, lease=1.0).release()
    assert capsys.readouterr().err == (
        f"run folder {tmp_path} is held by process 99 on node-7, which started 10 min ago; waiting"
        " up to 1 s for a sign of life\n"
    )


def test_a_start_on_a_full_disk_leaves_no_lock(tmp_path: Path) -> None:
    with full_disk(), pytest.raises(OSError, match="File too large") as raised:
        RunLock(tmp_path)
    assert raised.value.filename == str(tmp_path / "lock-1.json") and not list(tmp_path.iterdir())
    lock = RunLock(tmp_path, lease=3600)
    assert lock.token == 1
    lock.release()


def test_a_removed_run_folder_is_named(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "run", heartbeat=0.05)
    shutil.rmtree(tmp_path / "run")
    lock._thread.join(300)
    assert lock.lost
    with pytest.raises(
        UserError, match=rf"run folder {tmp_path}/run or the lock in it was removed"
    ):
        lock.check()
    lock.release()
    assert not (tmp_path / "run").exists()


def test_stray_files_among_staging_folders_do_not_stop_a_start(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    (root / ".staging-step-000000003").mkdir(parents=True)
    (root / ".staging-x").write_text("mine")
    (root / ".staging-fenced-1-0").symlink_to(tmp_path)
    RunLock(tmp_path).release()
    assert (root / ".staging-fenced-1-1").is_dir() and (root / ".staging-x").read_text() == "mine"


def test_a_slow_takeover_does_not_disturb_later_holders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two others acquire the lock while it reads a dead holder's: its number is then outdated."""
    RunLock(tmp_path)._stop.set()
    rewrite(tmp_path, started="1")
    real, others = lock_module._is_over, []

    def slow(path: Path, lease: float) -> bool:
        over = real(path, lease)
        if not others:
            others.append(None)
            RunLock(tmp_path).release()
            others.append(RunLock(tmp_path))
        return over

    monkeypatch.setattr(lock_module, "_is_over", slow)
    with pytest.raises(RunInUseError):
        RunLock(tmp_path)
    others[1].check()
    others[1].release()
    assert [path.name for path in tmp_path.iterdir()] == ["lock-3.json"]
