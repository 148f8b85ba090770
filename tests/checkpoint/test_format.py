"""Format on disk: chunks tile ranges; a checkpoint is read whole or refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextpt.base.collective import RankGroup
from nextpt.base.errors import CheckpointError
from nextpt.checkpoint.chunks import chunk_numel, slices_within, split_range, whole
from nextpt.checkpoint.commit import save
from nextpt.checkpoint.folders import folder_of_step, steps
from nextpt.checkpoint.format import Checkpoint
from nextpt.checkpoint.manifest import read_manifest
from nextpt.checkpoint.selection import open_checkpoint, select_checkpoint
from nextpt.checkpoint.state import Fragment
from tests.support.checkpoints import KINDS, SHAPES, State, holds, write

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "checkpoints"


@pytest.mark.thorough
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple), st.data())
def test_chunks_tile_any_range(shape: tuple[int, ...], data: st.DataObject) -> None:
    outer = whole(shape)
    if data.draw(st.booleans()):  # of a part of the tensor, as a tensor-parallel rank holds it
        outer = tuple(
            (start, data.draw(st.integers(start + 1, size)))
            for size in shape
            for start in [data.draw(st.integers(0, size - 1))]
        )
    size = chunk_numel(outer)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    marks = torch.arange(math.prod(shape)).view(shape)
    tiles = split_range(outer, start, stop)
    elements = [
        int(i) for tile in tiles for i in marks[slices_within(tile, whole(shape))].flatten()
    ]
    assert elements == marks[slices_within(outer, whole(shape))].flatten()[start:stop].tolist()
    assert len(tiles) <= 2 * len(shape) - 1 and sum(map(chunk_numel, tiles)) == stop - start


@pytest.mark.thorough
@settings(deadline=None)
@given(name=st.sampled_from(sorted(SHAPES)), data=st.data())
def test_any_range_reads_back(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.getbasetemp() / "ranges"
    checkpoint = (
        Checkpoint(folder_of_step(root, 1)) if root.exists() else Checkpoint(write(root, 1))
    )
    size = math.prod(SHAPES[name])
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    for kind in KINDS:
        assert torch.equal(
            checkpoint.read(name, kind, start, stop), State().values[(name, kind)][start:stop]
        )


class Columns(State):
    """Matrices divided by columns, as under tensor parallelism, and each part by flat ranges."""

    def fragments(self) -> Iterator[Fragment]:
        for (name, kind), flat in self.values.items():
            shape = SHAPES[name]
            half = shape[-1] // 2
            for first, last in ((0, half), (half, shape[-1])):
                chunk = (*whole(shape[:-1]), (first, last))
                part = flat.view(shape)[slices_within(chunk, whole(shape))].reshape(-1)
                cut = part.numel() // 3
                for start, stop in ((0, cut), (cut, part.numel())):
                    yield Fragment(name, kind, shape, start, stop, part[start:stop], chunk)


def test_columns_read_back_as_flat_ranges_and_flat_ranges_as_columns(tmp_path: Path) -> None:
    group = RankGroup.world()
    by_columns = Checkpoint(
        save(tmp_path / "columns", Columns(), {"step": 1, "config": {}}, {}, group).folder
    )
    assert holds(by_columns, 1.0)
    by_ranges = Checkpoint(write(tmp_path / "ranges", 1))
    for f in Columns().fragments():
        for checkpoint in (by_columns, by_ranges):
            assert torch.equal(checkpoint.read(f.name, f.kind, f.start, f.stop, f.chunk), f.tensor)


def test_a_checkpoint_of_another_model_or_optimizer_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write(tmp_path, 1))
    shapes = State().state_shapes()
    checkpoint.check_state(shapes)
    assert checkpoint.kinds("b") == ("exp_avg", "exp_avg_sq", "weight")
    with pytest.raises(CheckpointError, match=r"of another model: .* b has the shape \(4,\)"):
        checkpoint.check_weights(checkpoint.shapes() | {"b": (5,)})
    momentum = shapes | {"b": {"weight": (4,), "momentum": (4,)}}
    with pytest.raises(
        CheckpointError,
        match=r"state of b is exp_avg \[4\], exp_avg_sq \[4\], this optimizer needs momentum \[4\]",
    ):
        checkpoint.check_state(momentum)


@pytest.mark.parametrize(
    ("version", "step", "value", "lineage"),
    [(1, 4, 3.0, []), (2, 1, 1.0, [[1, 1]]), (2, 2, 2.5, [[1, 2]])],
)
def test_checkpoints_of_older_format_versions_are_read_and_continued(
    tmp_path: Path, version: int, step: int, value: float, lineage: list[list[int]]
) -> None:
    """Written by State(value) of commit df2806d, on two or three ranks."""
    shutil.copytree(FIXTURES / f"version-{version}", tmp_path / "run")
    checkpoint = open_checkpoint(tmp_path / "run", step)
    assert checkpoint.step == step and holds(checkpoint, value)
    checkpoint.check_state(State().state_shapes())
    manifest = read_manifest(checkpoint.folder)
    assert (manifest.format_version, manifest.lineage) == (version, lineage)
    after = read_manifest(write(tmp_path / "run", step + 1, 9.0, lineage=manifest.lineage))
    assert after.descends_from(manifest) and holds(open_checkpoint(tmp_path / "run"), 9.0)


def test_equal_state_gives_equal_bytes(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", 5), write(tmp_path / "b", 5)
    names = sorted(p.name for p in a.iterdir())
    assert names == ["manifest.json", "rank-00000.json", "rank-00000.safetensors", "state.json"]
    assert all((a / n).read_bytes() == (b / n).read_bytes() for n in names)


@pytest.mark.parametrize(
    "name", ["rank-00000.safetensors", "rank-00000.json", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(
    tmp_path: Path, name: str, damage: str
) -> None:
    write(tmp_path, 1)
    path = write(tmp_path, 2) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:-1])
    warnings: list[str] = []
    checkpoint = select_checkpoint(tmp_path, "auto", RankGroup.world(), warnings.append)
    assert checkpoint is not None and checkpoint.step == 1
    assert (
        len(warnings) == 1
        and "step-000000002" in warnings[0]
        and "resuming from step 1" in warnings[0]
    )
    with pytest.raises(CheckpointError, match="step-000000002 is not usable"):
        select_checkpoint(tmp_path, 2, RankGroup.world(), warnings.append)


def test_all_checkpoints_damaged_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    for step in (1, 2):
        (write(tmp_path, step) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not start from nothing") as raised:
        select_checkpoint(tmp_path, "auto", RankGroup.world(), print)
    assert "step-000000001" in str(raised.value) and "step-000000002" in str(raised.value)


def test_an_unfinished_save_is_not_a_checkpoint_and_the_next_removes_it(tmp_path: Path) -> None:
    (tmp_path / ".staging-step-000000009").mkdir()
    (tmp_path / ".staging-step-000000009" / "rank-00000.safetensors").write_bytes(b"half")
    assert (
        steps(tmp_path) == []
        and select_checkpoint(tmp_path, "auto", RankGroup.world(), print) is None
    )
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)
    write(tmp_path, 10)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000010"]


def test_a_second_save_of_a_step_gets_another_name_and_is_newer(tmp_path: Path) -> None:
    first = write(tmp_path, 4, 1.0)
    before = {p.name: p.read_bytes() for p in first.iterdir()}
    assert (
        write(tmp_path, 4, 2.0).name == "step-000000004.2"
        and write(tmp_path, 4, 3.0).name == "step-000000004.3"
    )
    assert {p.name: p.read_bytes() for p in first.iterdir()} == before
    assert torch.equal(
        open_checkpoint(tmp_path).read("b", "weight", 0, 4), State(3.0).values[("b", "weight")]
    )
    assert torch.equal(
        open_checkpoint(tmp_path, 4).read("b", "weight", 0, 4), State(3.0).values[("b", "weight")]
    )


def test_a_failing_save_leaves_the_previous_one_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, 1)

    class Broken(State):
        def fragments(self) -> Iterator[Fragment]:
            yield next(iter(super().fragments()))
            raise RuntimeError("device\nlost")

    with pytest.raises(CheckpointError, match="failed on rank 0: RuntimeError: device lost"):
        save(tmp_path, Broken(), {"step": 2}, {}, RankGroup.world())
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]


def test_gaps_are_not_read_as_zeros(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    index = json.loads((folder / "rank-00000.json").read_text())
    index["fragments"] = index["fragments"][1:]
    (folder / "rank-00000.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="gaps or overlap"):
        Checkpoint(folder).read_whole("a")


@pytest.mark.process
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_named_and_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        write(tmp_path, 1)
        (tmp_path / "ballast").write_bytes(b"0" * (2**17 + 2**16))
        with pytest.raises(CheckpointError, match="no space left"):
            save(
                tmp_path,
                State(),
                {"step": 2, "config": {"long": "x" * 2**16}},
                {},
                RankGroup.world(),
            )
        assert steps(tmp_path) == [1] and open_checkpoint(tmp_path).step == 1
        assert sorted(p.name for p in tmp_path.iterdir()) == ["ballast", "step-000000001"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
