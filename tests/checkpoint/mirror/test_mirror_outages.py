"""Mirror of checkpoints under failures: outages, kills, full disks, corrupting stores."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nextpt.base.errors import CheckpointError
from nextpt.checkpoint import manager as manager_module
from nextpt.checkpoint.folders import steps
from nextpt.checkpoint.mirror import retry as retry_module
from nextpt.checkpoint.mirror.archive import Archive
from tests.support.file_operations import refusing
from tests.support.mirror_jobs import MirroredJob, corrupt, valid_steps
from tests.support.proxy import Proxy

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.thorough
@pytest.mark.parametrize(
    "mode",
    [
        "503",
        *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("refuse", "hang", "truncate")),
    ],
)
def test_an_outage_delays_nothing_and_uploads_catch_up(
    link: Proxy, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mode == "hang":
        monkeypatch.setattr(retry_module, "STALL_SECONDS", 5.0)
    uri = f"s3://bucket/{tmp_path.name}"
    job = MirroredJob(tmp_path / "run", uri).save(1)
    job.wait_for("mirrored", 1)
    link.mode = mode
    job.save(2, 3, 4, 5, 6)
    job.wait_for("failing")
    job.save(7, 8, 9)
    assert len(steps(tmp_path / "run")) <= 3  # two, and the one being uploaded
    link.mode = "pass"
    assert (
        job.end() == []
        and 9 in job.steps_with("mirrored")
        and valid_steps(uri)[0] == 9
        and len(valid_steps(uri)) == 2
    )
    missed = set(range(2, 9)) - set(job.steps_with("mirrored"))
    assert sorted(job.steps_with("skipped")) == sorted(missed) and len(missed) >= 5
    assert len(job.steps_with("failing")) == 1
    message = next(event.message for event in job.events if event.status == "failing")
    assert message.startswith(f"{uri}: ") and "\n" not in message


@pytest.mark.thorough
def test_an_end_in_an_outage_reports_missing_steps_and_the_next_start_uploads_them(
    link: Proxy, tmp_path: Path
) -> None:
    uri = f"s3://bucket/{tmp_path.name}"
    job = MirroredJob(tmp_path / "run", uri).save(1)
    job.wait_for("mirrored", 1)
    link.mode = "hang"
    assert job.save(2, 3).end(0.2) == [2, 3]
    link.mode = "pass"
    assert MirroredJob(tmp_path / "run", uri).end() == [] and valid_steps(uri) == [3, 2]


def test_a_checkpoint_stays_while_it_is_uploaded(tmp_path: Path) -> None:
    job = MirroredJob(tmp_path / "run", f"file://{tmp_path}/mirror")
    sent, go_on, write_there = threading.Event(), threading.Event(), job.mirror.archive.store.write

    def wait_in_the_middle(name: str, blocks: Iterator[bytes]) -> None:
        write_there(name, blocks)
        if name.endswith("rank-00000.safetensors"):
            sent.set()
            assert go_on.wait(100)  # less than the store may hang

    job.mirror.archive.store.write = wait_in_the_middle
    job.save(1)
    assert sent.wait(300)
    job.save(2, 3, 4)
    assert steps(tmp_path / "run") == [4, 3, 1]
    go_on.set()
    job.wait_for("mirrored", 1)
    job.save(5)
    assert (
        1 not in steps(tmp_path / "run")
        and job.end() == []
        and valid_steps(f"file://{tmp_path}/mirror") == [5, 4]
    )


@pytest.mark.slow
def test_a_killed_upload_does_not_count_and_the_next_start_continues_it(
    link: Proxy, tmp_path: Path
) -> None:
    uri = f"s3://bucket/{tmp_path.name}"
    assert MirroredJob(tmp_path / "run", uri).save(1).end() == []
    script = (
        "import sys, threading\nfrom pathlib import Path\n"
        "from tests.support.mirror_jobs import MirroredJob\n"
        "job = MirroredJob(Path(sys.argv[1]), sys.argv[2])\n"
        "write = job.mirror.archive.store.write\n"
        "def write_no_manifest(name, blocks):\n"
        "    if name.endswith('manifest.json'): threading.Event().wait()\n"
        "    write(name, blocks)\n"
        "job.mirror.archive.store.write = write_no_manifest\n"
        "job.save(2, 3)\nthreading.Event().wait()"
    )
    link.mode = "slow"
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "run"), uri],
        cwd=ROOT,
        stderr=subprocess.PIPE,
    )
    direct = Archive(uri)
    deadline = time.monotonic() + 300
    while not (
        half := [stored for stored in direct.checkpoints() if not stored.complete]
    ) or 3 not in steps(tmp_path / "run"):
        assert time.monotonic() < deadline and child.poll() is None, child.stderr.read().decode()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stderr.close()
    link.mode = "pass"
    assert half[0].step in (2, 3)
    lost = MirroredJob(tmp_path / "elsewhere", uri)  # the node is gone
    assert lost.checkpoint.step == max(
        stored.step for stored in direct.checkpoints() if stored.complete
    )
    lost.mirror.stop()
    assert MirroredJob(tmp_path / "run", uri).end() == [] and valid_steps(uri) == [3, 2]


def test_a_full_disk_during_a_restore_leaves_nothing(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/mirror"
    assert MirroredJob(tmp_path / "run", uri).save(1).end() == []
    with (
        refusing(r"staging-fetch.*safetensors", 28),
        pytest.raises(CheckpointError, match="No space left on device"),
    ):
        MirroredJob(tmp_path / "other", uri)
    assert not list((tmp_path / "other").iterdir())


@pytest.mark.thorough
def test_truncated_answers_during_a_restore_leave_nothing(
    link: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"s3://bucket/{tmp_path.name}"
    assert MirroredJob(tmp_path / "run", uri).save(1).end() == []
    fetch_there = manager_module.fetch

    def cut(*arguments: Any) -> str | None:
        link.mode = "truncate"
        return fetch_there(*arguments)

    monkeypatch.setattr(manager_module, "fetch", cut)
    with pytest.raises(CheckpointError, match="cannot be fetched"):
        MirroredJob(tmp_path / "other", uri)
    assert not list((tmp_path / "other").iterdir())
    monkeypatch.undo()
    link.mode = "pass"
    monkeypatch.setenv("S3_ENDPOINT_URL", link.address)
    assert MirroredJob(tmp_path / "other", uri).checkpoint.step == 1


@pytest.mark.thorough
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))]
)
def test_two_valid_checkpoints_exist_at_every_instant_once_there_were_two(
    tmp_path: Path, seed: int
) -> None:
    """Two valid checkpoints exist before each removal.

    For saves, rollbacks, lost disks, starts and damage that leaves two, in any order.
    """
    chance, uri, step, had_two = random.Random(seed), f"file://{tmp_path}/mirror", 0, False

    def now_whole(without: str = "") -> int:
        archive = Archive(uri)
        return sum(
            checkpoint.complete and archive.problem(checkpoint) is None
            for checkpoint in archive.checkpoints()
            if checkpoint.name != without
        )

    def watched(job: MirroredJob) -> MirroredJob:
        remove_there = job.mirror.archive.store.remove

        def remove(name: str) -> None:
            counts.append(now_whole(name.partition("/")[0]))
            remove_there(name)

        job.mirror.archive.store.remove = remove
        return job

    counts: list[int] = []
    for _ in range(12):
        if had_two and chance.random() < 0.3:
            shutil.rmtree(tmp_path / "run")
        resume = (
            chance.choice(steps(tmp_path / "run"))
            if (tmp_path / "run").exists() and chance.random() < 0.2
            else "auto"
        )
        job = watched(
            MirroredJob(tmp_path / "run", uri, keep_every=chance.choice([None, 3]), resume=resume)
        )
        step = job.checkpoint.step if job.checkpoint else 0
        for _ in range(chance.randint(1, 3)):
            step += 1
            job.save(step)
        assert job.end() == []
        assert now_whole() >= 2 or not had_two
        had_two = had_two or now_whole() >= 2
        stored = [checkpoint for checkpoint in Archive(uri).checkpoints() if checkpoint.complete]
        if len(stored) > 2 and now_whole() > 2:
            victim = Archive(uri).store.path(f"{chance.choice(stored).name}/state.json")
            Path(victim).write_text("{}")
    assert counts and min(counts) >= 2


def test_a_damaged_mirrored_checkpoint_stays_until_two_are_valid(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/mirror"
    assert MirroredJob(tmp_path / "run", uri).save(1, 2).end() == []
    corrupt(uri, 1, "manifest.json", lambda data: data[:-1])
    shutil.rmtree(tmp_path / "run" / "step-000000001")
    job = MirroredJob(tmp_path / "run", uri)
    job.wait_for("damaged", 1)
    assert job.end() == [] and [stored.step for stored in Archive(uri).checkpoints()] == [2, 1]
    assert MirroredJob(tmp_path / "run", uri).save(3).end() == [] and valid_steps(uri) == [3, 2]


def test_data_that_a_store_corrupts_is_detected_before_the_commit(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/mirror"
    job = MirroredJob(tmp_path / "run", uri)
    store, wrong = job.mirror.archive.store, ["state.json", "manifest.json"]
    write_there = store.write

    def write_wrongly(name: str, blocks: Iterator[bytes]) -> None:
        data = b"".join(blocks)
        if name.rpartition("/")[2] in wrong:
            wrong.remove(name.rpartition("/")[2])
            data = data.replace(b"1", b"2")
        write_there(name, [data])

    store.write = write_wrongly
    assert job.save(1).end() == [] and wrong == [] and valid_steps(uri) == [1]
    (failing,) = [event.message for event in job.events if event.status == "failing"]
    assert "state.json does not hold what was sent" in failing
