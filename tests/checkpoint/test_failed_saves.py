"""Failed saves: the report of the error, the files left behind, and the next save."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nextpt.base.collective import RankGroup
from nextpt.base.errors import CheckpointError
from nextpt.checkpoint.manager import CheckpointManager, FailedSave
from nextpt.checkpoint.manifest import read_manifest
from nextpt.checkpoint.selection import open_checkpoint
from nextpt.config import CheckpointSection
from tests.support.checkpoints import State, holds, on_ranks
from tests.support.file_operations import refusing


def save(manager: CheckpointManager, group: RankGroup, step: int, wait: bool) -> list[object]:
    outcomes = manager.save(
        State(float(step), group.rank, group.world_size),
        {"step": step, "config": {}},
        {},
        wait=wait,
    )
    while not outcomes:
        outcomes = manager.poll()
    return outcomes


def messages(outcomes: list[object]) -> list[object]:
    """Step, rank, errno and consecutive failures of each failed save; else its folder."""
    return [
        (
            (o.step, o.error.rank, o.error.number, o.consecutive)
            if isinstance(o, FailedSave)
            else o.checkpoint.folder.name
        )
        for o in outcomes
    ]


def fail_twice(
    root: Path,
    begin: Callable[[], object],
    end: Callable[[], object],
    asynchronous: bool,
    world_size: int = 2,
) -> list[list[object]]:
    """Save steps 1 to 4 on each rank, 2 and 3 between `begin` and `end`.

    Returns rank 0's outcome of each, and the first message.
    """

    def job(group: RankGroup) -> list[list[object]]:
        manager = CheckpointManager(
            root, CheckpointSection(asynchronous=asynchronous), group, lambda text: None
        )
        manager.resume()
        all_messages = []
        for step in (1, 2, 3, 4):
            for change, at in ((begin, 2), (end, 4)):
                group.all_gather(change() and None if group.rank == 0 and step == at else None)
            outcomes = save(manager, group, step, wait=False)
            all_messages.append(messages(outcomes) + [str(o.error) for o in outcomes if step == 2])
            group.all_gather(None)
            if step in (2, 3) and group.rank == 0:
                # The previous checkpoint is valid, no file is half-written
                assert open_checkpoint(root).step == 1 and not list(root.glob(".*"))
            group.all_gather(None)
        return all_messages

    by_rank = on_ranks(world_size, job)
    assert by_rank[0] == by_rank[-1]
    assert holds(open_checkpoint(root), 4.0)
    assert read_manifest(root / "step-000000004").lineage == [[1, 2]]  # failed saves have no number
    return by_rank[0]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("number", "pattern", "rank"),
    [
        (errno.EDQUOT, r"rank-00001\.safetensors", 1),
        (errno.EIO, r"rank-00001\.json", 1),
        (errno.EIO, "manifest", 0),
        (errno.EROFS, "state", 0),
    ],
)
def test_all_ranks_report_the_failed_rank_and_its_error(
    tmp_path: Path, number: int, pattern: str, rank: int, asynchronous: bool
) -> None:
    shim = refusing(pattern, number)
    first, second, third, fourth = fail_twice(
        tmp_path, shim.__enter__, lambda: shim.__exit__(None, None, None), asynchronous
    )
    message = second.pop()
    assert (first, second, third, fourth) == (
        ["step-000000001"],
        [(2, rank, number, 1)],
        [(3, rank, number, 2)],
        ["step-000000004"],
    )
    assert (
        f"failed on rank {rank}: " in message
        and os.strerror(number) in message
        and errno.errorcode[number] in message
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a small file system is not allowed here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.process
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_with_room_again_later(small_disk: Path, asynchronous: bool) -> None:
    ballast = small_disk / "ballast"

    def fill() -> None:
        with open(ballast, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    _, second, *_ = fail_twice(small_disk / "run", fill, ballast.unlink, asynchronous)
    assert (
        second[0][2:] == (errno.ENOSPC, 1)
        and "No space left on device (ENOSPC); free some" in second[1]
    )


@pytest.mark.process
def test_tensors_that_do_not_fit_the_disk_are_reported_with_the_errno(
    small_disk: Path,
) -> None:
    """Safetensors reports the errno only in its message."""
    manager = CheckpointManager(
        small_disk / "run", CheckpointSection(), RankGroup.world(), lambda text: None
    )
    save(manager, RankGroup.world(), 1, wait=True)
    state = State()
    state.values = {key: flat.repeat(1) for key, flat in state.values.items()}
    (small_disk / "ballast").write_bytes(bytes(2**17 + 2**16 + 2**15))
    free = os.statvfs(small_disk).f_bavail * 4096
    # One page: room for the names, not for the tensors
    (small_disk / "more").write_bytes(bytes(free - 4096))
    (failed,) = manager.save(state, {"step": 2, "config": {}}, {})
    assert failed.error.number == errno.ENOSPC and "No space left on device" in str(failed.error)


@pytest.mark.process
def test_a_file_system_that_becomes_read_only(small_disk: Path) -> None:
    def remount(mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", str(small_disk)], check=True)

    _, second, *_ = fail_twice(
        small_disk / "run", lambda: remount("ro"), lambda: remount("rw"), asynchronous=True
    )
    assert second[0] == (2, 0, errno.EROFS, 1) and "Read-only file system (EROFS)" in second[1]


def test_an_error_of_the_program_ends_training(tmp_path: Path) -> None:
    manager = CheckpointManager(
        tmp_path,
        CheckpointSection(),
        RankGroup.world(),
        lambda text: None,
        may_commit=lambda: 1 / 0,
    )
    with pytest.raises(CheckpointError, match="ZeroDivisionError") as raised:
        save(manager, RankGroup.world(), 1, wait=True)
    assert type(raised.value) is CheckpointError and not list(tmp_path.iterdir())


def test_a_failed_retention_is_not_a_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    manager = CheckpointManager(tmp_path, CheckpointSection(), RankGroup.world(), warnings.append)

    def refuse() -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(manager, "_plan_retention", refuse)
    assert messages(save(manager, RankGroup.world(), 1, wait=True)) == ["step-000000001"]
    assert (
        len(warnings) == 1
        and "no old checkpoint was removed" in warnings[0]
        and "Input/output error" in warnings[0]
    )
