"""CheckpointManager: retention, rollback, asynchronous saves."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from nextpt.base.collective import RankGroup
from nextpt.checkpoint import manager as manager_module
from nextpt.checkpoint.manager import CheckpointManager, FailedSave, SavedCheckpoint
from nextpt.checkpoint.selection import open_checkpoint
from nextpt.config import CheckpointSection
from tests.support.checkpoints import State, holds, on_ranks


def run(
    root: Path,
    group: RankGroup,
    saves: list[tuple[int, float | None]],
    warnings: list[str] | None = None,
    **settings: object,
) -> list[SavedCheckpoint]:
    """Start, then save each (step, validation loss) and wait for it."""
    manager = CheckpointManager(
        root,
        CheckpointSection(**settings),
        group,
        (warnings if warnings is not None else []).append,
    )
    manager.resume()
    state = State(1.0, group.rank, group.world_size)
    return [
        save
        for step, loss in saves
        for save in manager.save(state, {"step": step, "config": {}}, {}, loss)
    ]


def names(root: Path) -> list[str]:
    return sorted(path.name.replace("step-00000000", "") for path in root.iterdir())


@pytest.mark.parametrize(
    ("settings", "remaining"),
    [
        ({}, ["6", "7", "8"]),
        ({"keep_last": None}, ["1", "2", "3", "4", "5", "6", "7", "8"]),
        ({"keep_last": 2}, ["7", "8"]),
        ({"keep_last": 2, "keep_every": 3}, ["3", "6", "7", "8"]),
        ({"keep_last": 2, "keep_best": 1}, ["3", "7", "8"]),
        ({"keep_last": 2, "keep_best": 2}, ["3", "4", "7", "8"]),
        ({"keep_last": 2, "keep_best": 9}, ["2", "3", "4", "7", "8"]),
    ],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_retention(
    tmp_path: Path, settings: dict[str, object], remaining: list[str], world_size: int
) -> None:
    losses = {2: 5.0, 3: 1.0, 4: 1.0, 7: 2.0}
    for part in (range(1, 5), range(5, 9)):  # a start between the saves changes nothing
        on_ranks(
            world_size,
            lambda group, part=part: run(
                tmp_path, group, [(s, losses.get(s)) for s in part], **settings
            ),
        )
    assert names(tmp_path) == remaining


def test_a_rollback_is_newest_and_removes_the_abandoned_later(tmp_path: Path) -> None:
    run(tmp_path, RankGroup.world(), [(s, None) for s in (2, 4, 6)], keep_last=2, keep_every=2)
    run(tmp_path, RankGroup.world(), [(3, None)], keep_last=2, keep_every=2, resume=2)
    assert open_checkpoint(tmp_path).step == 3  # and not 6
    assert names(tmp_path) == ["2", "3", "4", "6"]
    run(tmp_path, RankGroup.world(), [(4, None)], keep_last=2, keep_every=2)
    assert open_checkpoint(tmp_path).folder.name == "step-000000004.2"
    assert open_checkpoint(tmp_path, 4).folder.name == "step-000000004.2"
    run(tmp_path, RankGroup.world(), [(5, None), (7, None)], keep_last=2, keep_every=2)
    assert names(tmp_path) == ["2", "4", "4.2", "5", "6", "7"]  # keep_every never expires
    run(tmp_path, RankGroup.world(), [(9, None)], keep_last=2, keep_every=2)
    assert names(tmp_path) == ["2", "4", "4.2", "6", "7", "9"]


def test_a_rollback_keeps_the_checkpoint_it_returned_to(tmp_path: Path) -> None:
    run(tmp_path, RankGroup.world(), [(s, None) for s in (2, 4, 6, 8)], keep_last=None)
    run(tmp_path, RankGroup.world(), [(5, None)], keep_last=2, resume=4)
    assert names(tmp_path) == ["4", "5", "8"]  # the newest two of the line, and of all
    run(tmp_path, RankGroup.world(), [(7, None)], keep_last=2)
    assert names(tmp_path) == ["5", "7"]


@pytest.mark.thorough
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_rollback_stays_in_the_lineage_and_uses_valid_checkpoints(
    tmp_path: Path, world_size: int
) -> None:
    """Steps 5 and 6 were abandoned for 5.2; 4 is damaged; 7 is newer."""
    on_ranks(
        world_size,
        lambda group: run(tmp_path, group, [(s, None) for s in (2, 3, 4, 5, 6)], keep_last=None),
    )
    on_ranks(
        world_size,
        lambda group: run(tmp_path, group, [(5, None), (7, None)], keep_last=None, resume=4),
    )
    path = tmp_path / "step-000000004" / "state.json"
    path.write_text(path.read_text().replace("4", "5"))
    warnings: list[str] = []

    def back(group: RankGroup) -> None:
        manager = CheckpointManager(
            tmp_path,
            CheckpointSection(keep_last=None),
            group,
            warnings.append if group.rank == 0 else lambda text: None,
        )
        assert manager.resume().step == 7
        assert (
            manager.rollback(7).folder.name == "step-000000005.2" and manager.rollback(5).step == 3
        )
        assert manager.rollback(2) is None
        manager.save(State(1.0, group.rank, group.world_size), {"step": 3, "config": {}}, {})
        # And not 5.2, which that rollback abandoned
        assert manager.rollback(7).folder.name == "step-000000003.2"

    on_ranks(world_size, back)
    assert (
        len(warnings) == 1
        and "state.json is damaged" in warnings[0]
        and "resuming from step 3" in warnings[0]
    )
    assert open_checkpoint(tmp_path).folder.name == "step-000000003.2"


def test_nothing_is_removed_unless_two_are_valid(tmp_path: Path) -> None:
    run(tmp_path, RankGroup.world(), [(1, None), (2, None)], keep_last=2)
    path = tmp_path / "step-000000002" / "state.json"
    warnings: list[str] = []
    manager = CheckpointManager(
        tmp_path, CheckpointSection(keep_last=2), RankGroup.world(), warnings.append
    )
    assert manager.resume().step == 2
    path.write_text(path.read_text().replace("1", "2"))
    manager.save(State(), {"step": 3, "config": {}}, {})
    assert names(tmp_path) == ["1", "2.damaged", "3"]
    assert (
        len(warnings) == 1
        and "state.json is damaged" in warnings[0]
        and "set aside as step-000000002.damaged" in warnings[0]
    )


def test_a_failed_removal_is_a_warning_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(manager_module, "remove", refuse)
    warnings: list[str] = []
    assert [
        save.checkpoint.folder.name[-1]
        for save in run(
            tmp_path, RankGroup.world(), [(1, None), (2, None), (3, None)], warnings, keep_last=2
        )
    ] == ["1", "2", "3"]
    assert (
        len(warnings) == 1
        and "step-000000001 is no longer needed and cannot be removed: Permission denied"
        in warnings[0]
    )


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Event for which the writer waits."""
    event, commit = threading.Event(), manager_module.commit

    def waiting(*arguments: object) -> object:
        assert event.wait(300)
        return commit(*arguments)

    monkeypatch.setattr(manager_module, "commit", waiting)
    return event


@pytest.mark.parametrize("world_size", [1, 2])
def test_training_goes_on_during_an_asynchronous_save(
    tmp_path: Path, gate: threading.Event, world_size: int
) -> None:
    def job(group: RankGroup) -> list[SavedCheckpoint]:
        manager = CheckpointManager(
            tmp_path, CheckpointSection(asynchronous=True), group, lambda text: None
        )
        assert manager.resume() is None
        state = State(1.0, group.rank, group.world_size)
        assert manager.save(state, {"step": 1, "config": {}}, {}, wait=False) == []
        for tensor in state.values.values():
            tensor.fill_(-1.0)  # training goes on
        assert manager.poll() == [] and not tmp_path.joinpath("step-000000001").exists()
        group.all_gather(None)
        gate.set()
        saves: list[SavedCheckpoint] = []
        while not saves:
            saves = manager.poll()
        assert manager.poll() == []
        return saves

    for (save,) in on_ranks(world_size, job):
        assert (
            save.checkpoint.folder.name == "step-000000001" and save.stall_seconds <= save.seconds
        )
    assert holds(open_checkpoint(tmp_path), 1.0)


def test_one_save_at_a_time_and_the_last_is_waited_for(
    tmp_path: Path, gate: threading.Event
) -> None:
    manager = CheckpointManager(
        tmp_path, CheckpointSection(asynchronous=True), RankGroup.world(), lambda text: None
    )
    assert manager.save(State(1.0), {"step": 1, "config": {}}, {}, wait=False) == []
    threading.Timer(0.2, gate.set).start()
    first = manager.save(State(2.0), {"step": 2, "config": {}}, {}, wait=False)
    assert [save.checkpoint.folder.name for save in first] == ["step-000000001"]
    last = manager.save(State(3.0), {"step": 3, "config": {}}, {}, wait=True)
    assert [save.checkpoint.folder.name for save in last] == ["step-000000002", "step-000000003"]
    assert [save.checkpoint.lineage for save in (*first, *last)] == [[[1, 1]], [[1, 2]], [[1, 3]]]


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_error_in_the_background_surfaces_on_every_rank(tmp_path: Path, world_size: int) -> None:
    def job(group: RankGroup) -> str:
        manager = CheckpointManager(
            tmp_path / "run", CheckpointSection(asynchronous=True), group, lambda text: None
        )
        (tmp_path / "run").write_text("a file where the folder should be")
        outcomes = manager.save(
            State(1.0, group.rank, group.world_size), {"step": 1, "config": {}}, {}, wait=False
        )
        while not outcomes:
            outcomes = manager.poll()
        assert manager.poll() == [] and isinstance(outcomes[0], FailedSave)
        return str(outcomes[0].error)

    messages = on_ranks(world_size, job)
    assert (
        len(set(messages)) == 1
        and f"failed on rank 0: {tmp_path / 'run'}: File exists (EEXIST)" in messages[0]
    )


def test_sequence_numbers_grow_although_manifests_are_lost(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, CheckpointSection(), RankGroup.world(), lambda text: None)
    lines = []
    for step in (1, 2, 3):
        lines += [
            save.checkpoint.lineage
            for save in manager.save(State(), {"step": step, "config": {}}, {})
        ]
        for manifest in tmp_path.glob("*/manifest.json"):
            manifest.write_text("lost")
    assert lines == [[[1, 1]], [[1, 2]], [[1, 3]]]


def test_files_and_links_with_the_name_of_a_staging_folder_are_named_and_kept(
    tmp_path: Path,
) -> None:
    root = tmp_path / "checkpoints"
    (root / ".staging-step-000000001").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    (root / ".staging-x").write_text("mine")
    (root / ".removing-y").symlink_to(tmp_path / "mine")
    warnings: list[str] = []
    run(root, RankGroup.world(), [(1, None), (2, None)], warnings)
    assert sorted(warnings) == [
        f"{root / name} is a file or a link, and not of a save; remove it"
        for name in (".removing-y", ".staging-x")
    ]
    assert (root / ".staging-x").read_text() == "mine" and (tmp_path / "mine").is_dir()
    assert open_checkpoint(root).step == 2 and not (root / ".staging-step-000000001").exists()
