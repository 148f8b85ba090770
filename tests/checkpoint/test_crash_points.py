"""Killed before any file operation, a run resumes from the last reported step or a later one."""

from __future__ import annotations

import os
import shutil
import signal
from itertools import count
from pathlib import Path

import pytest

from nextpt.base.collective import RankGroup
from nextpt.checkpoint.folders import checkpoint_folders, step_of
from nextpt.checkpoint.manager import CheckpointManager
from nextpt.checkpoint.verification import verify_checkpoint
from nextpt.config import CheckpointSection
from tests.support.checkpoints import State, holds, on_ranks
from tests.support.file_operations import dying_at
from tests.support.forked import run_in_child

pytestmark = pytest.mark.process


def start_and_save(
    root: Path, world_size: int, steps: list[int], acknowledge: int | None = None, wait: bool = True
) -> list[int]:
    """A job that resumes and saves State(step) at each of the steps.

    Returns the step from which each rank resumed (0: none).

    wait: Whether to wait for each save. Otherwise a thread writes it; the next save waits for it.
    """

    def job(group: RankGroup) -> int:
        manager = CheckpointManager(
            root, CheckpointSection(keep_last=2, asynchronous=not wait), group, lambda text: None
        )
        checkpoint = manager.resume()
        assert checkpoint is None or holds(checkpoint, checkpoint.step)
        for step in steps:
            extras = {"step": step, "config": {}}
            finished = manager.save(
                State(step, group.rank, group.world_size),
                extras,
                {},
                wait=wait or step == steps[-1],
            )
            if acknowledge is not None and group.rank == 0:
                os.write(acknowledge, bytes(step_of(save.checkpoint.folder) for save in finished))
        return checkpoint.step if checkpoint else 0

    return on_ranks(world_size, job)


def good(root: Path) -> list[int]:
    return [
        step_of(f)
        for f in checkpoint_folders(root)
        if verify_checkpoint(f, RankGroup.world()) is None
    ]


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Step 2, two damaged step 3 (one set aside), leftovers of a killed save and removal."""
    root = tmp_path_factory.mktemp("before") / "checkpoints"
    start_and_save(root, 2, [2, 3])
    (root / "step-000000003" / "state.json").write_text("torn")
    shutil.copytree(root / "step-000000003", root / "step-000000003.damaged")
    shutil.copytree(root / "step-000000002", root / ".staging-step-000000004")
    shutil.copytree(root / "step-000000002", root / ".removing-step-000000001")
    assert good(root) == [2]
    return root


@pytest.mark.parametrize(
    ("world_size", "wait", "stride", "power_loss"),
    [
        (1, True, 1, True),
        (1, True, 5, False),
        (2, True, 7, True),
        (2, False, 7, True),
        *(
            pytest.param(world_size, wait, 1, power_loss, marks=pytest.mark.slow)
            for world_size in (1, 2)
            for wait in (True, False)
            for power_loss in (False, True)
        ),
    ],
)
def test_killed_before_every_operation(
    before: Path, tmp_path: Path, world_size: int, wait: bool, stride: int, power_loss: bool
) -> None:
    """A start that sets a damaged checkpoint aside, three saves, two retentions.

    Kills happen at every operation, or at every stride-th.
    """
    ends: set[str] = set()
    for at in count(0, stride):
        root = tmp_path / str(at) / "checkpoints"
        shutil.copytree(before, root)
        reader, writer = os.pipe()

        def die(root: Path = root, at: int = at, writer: int = writer) -> None:
            with dying_at(root, at, real=True, power_loss=power_loss):
                start_and_save(root, world_size, [3, 4, 5], writer, wait)

        code = run_in_child(die)
        os.close(writer)
        acknowledged = [2, *os.read(reader, 100)]
        os.close(reader)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        steps = good(root)
        assert 0 <= steps[0] - acknowledged[-1] <= (1 if wait else 2), at
        assert len(steps) >= min(2, len(acknowledged)), at
        ends.add(" ".join(map(str, steps)))
        resumed = start_and_save(root, 3 - world_size, [9])
        assert set(resumed) == {steps[0]}
        assert good(root) == [9, steps[0]]
        assert not [p for p in root.iterdir() if p.name.startswith(".")]
        shutil.rmtree(root.parent)
    assert (
        at >= 70
        and {"2", "3 2", "4 3", "5 4"} <= ends
        and (stride > 1 or ends & {"4 3 2", "5 4 3"})
    ), (at, ends)


def test_killed_before_every_operation_of_a_first_save(tmp_path: Path) -> None:
    for at in count():
        root = tmp_path / str(at) / "checkpoints"
        root.parent.mkdir()

        def die(root: Path = root, at: int = at) -> None:
            with dying_at(root, at, real=True):
                start_and_save(root, 1, [1])

        if run_in_child(die) == 0:
            break
        steps = good(root)
        assert steps in ([], [1]) and start_and_save(root, 1, [2]) == [steps[0] if steps else 0]
    assert at >= 14
