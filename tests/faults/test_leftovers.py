"""Leftovers of killed jobs: a start removes them and touches nothing of a living job."""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from nextpt.base.collective import RankGroup
from nextpt.base.processes import child_pids
from nextpt.checkpoint.folders import steps
from nextpt.checkpoint.manager import CheckpointManager
from nextpt.config import CheckpointSection, to_yaml
from nextpt.data.streaming_backend import remove_stale
from nextpt.events import read_events
from nextpt.job.lock import RunLock
from tests.support.checkpoints import write
from tests.support.datasets import tiny
from tests.support.ranks import run_ranks, start_ranks

ROOT = Path(__file__).resolve().parents[2]
RUN = str(ROOT / "launcher" / "run.py")


@pytest.fixture
def shared() -> Iterator[dict[str, Path]]:
    """Files in shared memory as DeepSpeed names them: of a dead job and of this process."""
    files = {
        state: Path(f"/dev/shm/deepspeed_allreduce_buffer_{uuid.uuid4().hex}_{state}")
        for state in ("dead", "living")
    }
    for state, path in files.items():
        path.write_bytes(state.encode() * 1000)
    with open(files["living"], "r+b") as file, mmap.mmap(file.fileno(), 0):
        yield files
    for path in files.values():
        path.unlink(missing_ok=True)


def test_a_new_lock_removes_temporary_files_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "stacks").mkdir()
    temporary = [
        tmp_path / ".config.yaml.tmp-1234",
        tmp_path / ".lock-1.json.tmp-99",
        tmp_path / "stacks" / ".rank-0.json.tmp-7",
    ]
    others = [
        tmp_path / "metrics.jsonl",
        tmp_path / "notes.tmp-1",
        tmp_path / ".hidden",
        tmp_path / "stacks" / "rank-0.txt",
    ]
    for path in temporary + others:
        path.write_text("x")
    lock = RunLock(tmp_path)
    assert not any(path.exists() for path in temporary) and all(path.exists() for path in others)
    lock.release()


def test_a_start_removes_what_a_job_killed_in_its_last_save_left(tmp_path: Path) -> None:
    """The run is complete, so no save would remove them."""
    folder = write(tmp_path, 4)
    for name in (".staging-step-000000005", ".staging-fenced-3-0", ".removing-step-000000003"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-00000.safetensors").write_bytes(b"half")
    assert (
        CheckpointManager(tmp_path, CheckpointSection(), RankGroup.world(), print).resume().folder
        == folder
    )
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.slow
def test_a_start_among_leftovers(dataset: Path, tmp_path: Path, shared: dict[str, Path]) -> None:
    """A compiler's lock, staging folders, a half-done removal, a lock of a reused process id."""
    run, extensions = tmp_path / "run", tmp_path / "extensions"
    for name in ("deepspeed_shm_comm", "shm_comm", "fused_adam", "cpu_adam"):
        for parent in (extensions / name, extensions / "py311_cpu" / name):
            parent.mkdir(parents=True)
            (parent / "lock").touch()
    for name in (".staging-step-000000004", ".staging-fenced-3-0", ".removing-step-000000002"):
        (run / "checkpoints" / name).mkdir(parents=True)
        (run / "checkpoints" / name / "rank-00000.safetensors").write_bytes(b"half")
    (run / ".exit.json.tmp-1").write_text("half")
    lock = RunLock(run)
    lock._stop.set()
    [path] = run.glob("lock-*.json")
    # This process is alive, but is not that one
    path.write_text(json.dumps(json.loads(path.read_text()) | {"started": "1"}))
    before = {state: file.read_bytes() for state, file in shared.items()}

    (tmp_path / "tiny.yaml").write_text(
        to_yaml(
            tiny(dataset, run, train={"steps": 3, "zero_stage": 3}, checkpoint={"every_steps": 2})
        )
    )
    run_ranks(
        [RUN, "--config", str(tmp_path / "tiny.yaml")],
        2,
        tmp_path / "logs",
        TORCH_EXTENSIONS_DIR=str(extensions),
    )
    assert [event["step"] for event in read_events(run / "metrics.jsonl", "train")] == [1, 2, 3]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "step-000000002",
        "step-000000003",
    ]
    assert not [p for p in run.iterdir() if ".tmp" in p.name]
    assert len(list(extensions.rglob("lock"))) == 8, "not ours: another job may wait at one of them"
    assert {state: file.read_bytes() for state, file in shared.items()} == before


@pytest.mark.slow
def test_a_port_in_use_is_a_one_line_error(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(to_yaml(tiny(dataset, tmp_path / "run")))
    with socket.socket() as owner:
        owner.bind(("127.0.0.1", 0))
        owner.listen()
        port = str(owner.getsockname()[1])
        [rank] = start_ranks(
            [[RUN, "--config", str(tmp_path / "tiny.yaml")]], tmp_path / "logs", MASTER_PORT=port
        )
        assert rank.wait(600) == 2
        with socket.create_connection(owner.getsockname(), 5):
            owner.accept()[0].close()
    message = (tmp_path / "logs" / "rank-0.log").read_text()
    assert (
        message.count("\n") == 1
        and f"error: ranks cannot meet at 127.0.0.1:{port}: " in message
        and "set MASTER_PORT" in message
    ), message
    assert not (tmp_path / "run").exists()


def left_by_streaming(shared: Path, number: int, folder: str) -> list[Path]:
    """Files as StreamingDataset names them and notes its folders in."""
    text = f"{folder}\0{number}".encode()
    files = [shared / f"{number:06}_{name}" for name in ("locals", "barrier", "shard_states")]
    files[0].write_bytes((4 + len(text)).to_bytes(4, "little") + text)
    for file in files[1:]:
        file.write_bytes(b"x" * 16)
    return files


@pytest.mark.thorough
def test_only_shared_memory_of_a_dead_dataset_is_removed(
    tmp_path: Path,
) -> None:
    dead, mapped, opened, elsewhere = (
        left_by_streaming(tmp_path, n, folder)
        for n, folder in enumerate(
            ["/data/train", "/data/train", "/data/other/../train", "/data/validation"]
        )
    )
    (tmp_path / "000009_locals").write_bytes(b"\xff")
    with open(mapped[1], "r+b") as file:
        area = mmap.mmap(file.fileno(), 0)
    with open(opened[0], "rb"):
        remove_stale(["/data/else", "/data/./train"], tmp_path)
    area.close()
    assert not any(path.exists() for path in dead)
    assert all(path.exists() for path in [*mapped, *opened, *elsewhere, tmp_path / "000009_locals"])
    remove_stale(["/data/train"], tmp_path)
    assert not any(path.exists() for path in [*mapped, *opened])


@pytest.mark.slow
def test_a_streaming_run_resumes_after_all_its_processes_were_killed(
    dataset: Path, tmp_path: Path
) -> None:
    """Python's resource tracker is killed as well, as when a control group is killed."""
    (tmp_path / "tmp").mkdir()
    config = tiny(
        tmp_path / "local",
        tmp_path / "run",
        data={"backend": "streaming", "remote": str(dataset), "scratch": str(tmp_path / "scratch")},
        train={"steps": 100_000, "zero_stage": 1},
        checkpoint={"every_steps": 2},
    )
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    command = [RUN, "--config", str(tmp_path / "run.yaml")]
    ranks = start_ranks([command] * 2, tmp_path / "first", TMPDIR=str(tmp_path / "tmp"))
    deadline = time.monotonic() + 600
    while not read_events(tmp_path / "run" / "metrics.jsonl", "checkpoint"):
        assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks), (
            tmp_path / "first" / "rank-0.log"
        ).read_text()
        time.sleep(0.05)
    for pid in [child for rank in ranks for child in child_pids(rank.pid)] + [
        rank.pid for rank in ranks
    ]:
        with suppress(ProcessLookupError):  # a child that was about to end
            os.kill(pid, signal.SIGKILL)
    for rank in ranks:
        rank.wait()
    assert any(names(path, tmp_path / "local") for path in Path("/dev/shm").glob("*_locals"))
    stop = max(steps(tmp_path / "run" / "checkpoints")) + 10
    ranks = start_ranks(
        [[*command, f"train.stop_at={stop}"]] * 2, tmp_path / "second", TMPDIR=str(tmp_path / "tmp")
    )
    try:
        assert [rank.wait(600) for rank in ranks] == [0, 0], (
            tmp_path / "second" / "rank-0.log"
        ).read_text()[-3000:]
    finally:
        for rank in ranks:
            rank.kill()
    assert read_events(tmp_path / "run" / "metrics.jsonl", "train")[-1]["step"] == stop


def names(path: Path, folder: Path) -> bool:
    """Whether shared memory of StreamingDataset is of a folder; other tests' may be gone by now."""
    with suppress(FileNotFoundError):
        return str(folder).encode() in path.read_bytes()
    return False
