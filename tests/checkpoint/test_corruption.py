"""Any damage to the bytes of a checkpoint is detected before a tensor is used."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from nextpt.base.collective import RankGroup
from nextpt.base.errors import NoValidCheckpointError
from nextpt.checkpoint.manifest import file_names
from nextpt.checkpoint.selection import select_checkpoint
from tests.support.checkpoints import as_version_1, edit, holds, on_ranks, write

Files = dict[str, bytes]
NAMES = sorted(file_names(2) | {"manifest.json"})
OLD, NEW = "step-000000001", "step-000000002"


@pytest.fixture(scope="module", params=[2, 1], ids=["format-2", "format-1"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of two ranks."""
    root = tmp_path_factory.mktemp("corruption")
    for step in (1, 2):
        folder = write(root, step, float(step), world_size=2)
        if request.param == 1:
            as_version_1(folder)
    shutil.copytree(root / NEW, root / "good")
    return root


def read(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def put(folder: Path, files: Files) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)


@st.composite
def damages(draw: st.DrawFn) -> Callable[[Files, Files], Files]:
    """(files of the newest, files of the one before) -> the newest after one accident."""
    kind = draw(
        st.sampled_from(
            [
                "flip",
                "flips",
                "zeros",
                "noise",
                "cut",
                "extend",
                "remove",
                "rename",
                "swap ranks",
                "other step",
                "empty",
            ]
        )
    )
    name, other = draw(st.sampled_from(NAMES)), draw(st.sampled_from(NAMES))
    fraction = draw(st.floats(0, 1, exclude_max=True))
    length = draw(st.sampled_from([1, 2, 16, 512, 4096]))
    seed = draw(st.integers(0, 2**32))

    def damage(files: Files, before: Files) -> Files:
        data, files = bytearray(files[name]), dict(files)
        at, chance = int(fraction * len(data)), random.Random(seed)
        if kind in ("flip", "flips"):
            for _ in range(1 if kind == "flip" else 3):
                data[at] ^= 1 << chance.randrange(8)
                at = chance.randrange(len(data))
        elif kind == "zeros":
            data[at : at + length] = bytes(len(data[at : at + length]))
        elif kind == "noise":
            data[at : at + length] = chance.randbytes(len(data[at : at + length]))
        elif kind == "cut":
            del data[at:]
        elif kind == "extend":
            data += bytes(length) if seed % 2 else chance.randbytes(length)
        elif kind == "empty":
            data.clear()
        files[name] = bytes(data)
        if kind == "remove":
            del files[name]
        elif kind == "rename":
            files[other if seed % 2 else name + "~"] = files.pop(name)
        elif kind == "swap ranks":
            files[name], files[other] = files[other], files[name]
        elif kind == "other step":
            files[name] = before[name]
        return files

    return damage


def check(root: Path, damage: Callable[[Files, Files], Files]) -> None:
    good, before = read(root / "good"), read(root / OLD)
    damaged = damage(good, before)
    assume(damaged != good)
    put(root / NEW, damaged)
    warnings: list[str] = []
    checkpoint = select_checkpoint(root, "auto", RankGroup.world(), warnings.append)
    assert checkpoint is not None and checkpoint.step == 1 and holds(checkpoint, 1.0)
    assert len(warnings) == 1 and NEW in warnings[0] and "resuming from step 1" in warnings[0]
    shutil.move(root / OLD, root / "before")
    try:
        with pytest.raises(NoValidCheckpointError, match="Training does not start from nothing"):
            select_checkpoint(root, "auto", RankGroup.world(), warnings.append)
    finally:
        shutil.move(root / "before", root / OLD)


@pytest.mark.thorough
@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(damage=damages())
def test_every_damage_is_detected(root: Path, damage: Callable[[Files, Files], Files]) -> None:
    check(root, damage)


@pytest.mark.slow
@settings(
    max_examples=1000,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(damage=damages())
def test_a_thousand_damages_are_detected(
    root: Path, damage: Callable[[Files, Files], Files]
) -> None:
    check(root, damage)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_in_every_byte_is_detected(root: Path, name: str) -> None:
    """One flipped bit in each byte of each file, one after the other."""
    good = read(root / "good")
    chance = random.Random(name)
    put(root / NEW, good)
    for at in range(len(good[name])):
        data = bytearray(good[name])
        data[at] ^= 1 << chance.randrange(8)
        (root / NEW / name).write_bytes(data)
        checkpoint = select_checkpoint(root, "auto", RankGroup.world(), lambda text: None)
        assert checkpoint is not None and checkpoint.step == 1, (name, at)


def test_an_undamaged_checkpoint_is_used(root: Path) -> None:
    """A reader that refuses everything would pass the checks above, but not this one."""
    put(root / NEW, read(root / "good"))
    checkpoint = select_checkpoint(root, "auto", RankGroup.world(), pytest.fail)
    assert checkpoint is not None and checkpoint.step == 2 and holds(checkpoint, 2.0)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(sequence=9),
        lambda m: m.update(lineage=[[1, 1], [9, 9]]),
        lambda m: m.update(loss=0.5),
        lambda m: m.update(xxh3="0" * 32),
        lambda m: m.pop("xxh3"),
    ],
)
def test_the_manifest_has_a_hash_of_itself(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    for step in (1, 2):
        write(tmp_path, step)
    edit(tmp_path / NEW / "manifest.json", change)
    warnings: list[str] = []
    assert (
        select_checkpoint(tmp_path, "auto", RankGroup.world(), warnings.append).step == 1
        and "its manifest is damaged" in warnings[0]
    )


@pytest.mark.thorough
@pytest.mark.parametrize("readers", [1, 2, 3, 7])
def test_any_number_of_ranks_agrees_on_damage(tmp_path: Path, readers: int) -> None:
    for step in (1, 2):
        write(tmp_path, step, float(step), world_size=2)
    for name in NAMES:
        path = tmp_path / NEW / name
        good = path.read_bytes()
        path.write_bytes(good[:-2] + bytes([good[-2] ^ 1]) + good[-1:])
        checkpoints = on_ranks(
            readers, lambda group: select_checkpoint(tmp_path, "auto", group, lambda text: None)
        )
        assert [checkpoint.step for checkpoint in checkpoints] == [1] * readers, name
        path.write_bytes(good)


def test_damaged_checkpoints_are_set_aside_and_their_step_can_be_saved_again(
    tmp_path: Path,
) -> None:
    for step in (1, 2):
        write(tmp_path, step)
    for attempt in ("", "-2"):
        (tmp_path / NEW / "state.json").write_text("{}")
        warnings: list[str] = []
        assert (
            select_checkpoint(
                tmp_path, "auto", RankGroup.world(), warnings.append, repair=True
            ).step
            == 1
        )
        assert (
            f"(set aside as {NEW}.damaged{attempt})" in warnings[0]
            and (tmp_path / f"{NEW}.damaged{attempt}" / "state.json").read_text() == "{}"
        )
        assert (
            select_checkpoint(tmp_path, "auto", RankGroup.world(), pytest.fail, repair=True).step
            == 1
        )  # warned once
        assert write(tmp_path, 2).name == NEW
    shutil.rmtree(tmp_path / OLD)
    shutil.rmtree(tmp_path / NEW)
    with pytest.raises(
        NoValidCheckpointError, match=f"{NEW}.damaged is not usable: it was set aside"
    ):
        select_checkpoint(tmp_path, "auto", RankGroup.world(), print)
    assert NoValidCheckpointError.exit_code == 65


def test_nothing_is_set_aside_when_none_is_valid(tmp_path: Path) -> None:
    for step in (1, 2):
        (write(tmp_path, step) / "state.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(NoValidCheckpointError):
            select_checkpoint(tmp_path, "auto", RankGroup.world(), print, repair=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [OLD, NEW]
