"""`nextpt checkpoint list`, `verify`, `fetch` and `average`, on run folders and mirrors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from launcher.cli import app
from nextpt.base.collective import RankGroup
from nextpt.checkpoint.commit import save
from nextpt.checkpoint.manifest import read_manifest
from nextpt.checkpoint.mirror.archive import Archive
from nextpt.checkpoint.selection import open_checkpoint
from nextpt.evaluate.loaded_model import open_model
from tests.support.checkpoints import holds, write
from tests.support.models import ModelState
from tests.support.runs import make_run


def nextpt(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])


@pytest.fixture
def locations(tmp_path: Path) -> tuple[Path, str]:
    """(run folder, address of its mirror) with the steps 1 and 2."""
    root = tmp_path / "run" / "checkpoints"
    archive = Archive(f"file://{tmp_path}/mirror")
    for step in (1, 2):
        folder = write(root, step, float(step), lineage=[[1, 1]] if step == 2 else [])
        archive.upload(folder, read_manifest(folder))
    archive.claim("run", "owner", "host")
    return tmp_path / "run", f"file://{tmp_path}/mirror"


@pytest.mark.thorough
def test_checkpoints_are_listed_newest_first(locations: tuple[Path, str], tmp_path: Path) -> None:
    for location in (*locations, tmp_path / "mirror", locations[0] / "checkpoints"):
        result = nextpt("list", location)
        lines = [line for line in result.stdout.splitlines() if "step-" in line]
        assert result.exit_code == 0 and [line.split()[:2] for line in lines] == [
            ["2", "2"],
            ["1", "1"],
        ]


@pytest.mark.thorough
@pytest.mark.parametrize("which", [0, 1])
def test_verify_detects_one_flipped_bit(
    locations: tuple[Path, str], which: int, tmp_path: Path
) -> None:
    location = locations[which]
    assert nextpt("verify", location).stdout.count("valid") == 2
    damaged = next((tmp_path / ("run", "mirror")[which]).rglob("*step-000000002*")) / "state.json"
    data = bytearray(damaged.read_bytes())
    data[5] ^= 1
    damaged.write_bytes(data)
    result = nextpt("verify", location)
    assert (
        result.exit_code == 65
        and "state.json is damaged" in " ".join(result.stdout.split())
        and result.stdout.count("valid") == 1
    )
    assert nextpt("verify", location, "--step", 1).exit_code == 0


@pytest.mark.thorough
def test_fetch_selects_the_newest_complete_checkpoint(
    locations: tuple[Path, str], tmp_path: Path
) -> None:
    assert nextpt("fetch", locations[1], "--output", tmp_path / "copy").exit_code == 0
    assert holds(open_checkpoint(tmp_path / "copy" / "checkpoints"), 2.0)
    (next((tmp_path / "mirror").glob("*step-000000002*")) / "state.json").write_text("{}")
    result = nextpt("fetch", locations[1], "--output", tmp_path / "other")
    assert result.exit_code == 0 and "is not usable" in result.stdout
    assert holds(open_checkpoint(tmp_path / "other" / "checkpoints"), 1.0)
    assert (
        nextpt("fetch", locations[1], "--output", tmp_path / "third", "--step", 2).exit_code == 65
    )
    assert not list((tmp_path / "third").rglob("step*"))


@pytest.mark.thorough
def test_user_errors_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        (("list", tmp_path / "none"), "is not a folder"),
        (("list", tmp_path / "empty"), "holds no checkpoint"),
        (
            ("verify", tmp_path / "empty", "--step", 3),
            "holds no checkpoint of step 3; there are: none",
        ),
        (("list", "nosuch://bucket/run"), "expected a path, s3://"),
        (("fetch", f"file://{tmp_path}/none", "--output", tmp_path / "x"), "holds no checkpoint"),
    ]:
        result = nextpt(*arguments)
        assert result.exit_code == 2 and message in result.stderr, result.output
    for command in ("list", "verify", "fetch"):
        assert "example: nextpt checkpoint" in nextpt(command, "--help").stdout


def test_average_writes_a_folder_for_other_commands(tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "mean"
    config, model, _ = make_run(run)
    embedding = next(iter(model.parameters()))
    before = embedding.detach().clone()
    with torch.no_grad():
        embedding.add_(1.0)
    extras = {"step": 7, "config": config.model_dump(mode="json")}
    ranks = RankGroup.world()
    save(run / "checkpoints", ModelState(model), extras, {}, ranks, lineage=[[1, 1]])
    result = nextpt("average", run, "--last", 2, "--output", output)
    assert result.exit_code == 0 and "mean of weight of steps 3, 7" in result.output
    mean = next(iter(open_model(output).decoder.parameters()))
    torch.testing.assert_close(mean, before + 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --last N or --steps FIRST..LAST"),
        (["--last", 2, "--steps", "3..7"], "give either --last N or --steps FIRST..LAST"),
        (["--steps", "7-3"], "--steps 7-3 is not of the form FIRST..LAST"),
        (["--last", 2], "has 1 checkpoints to average, expected 2 or more"),
        (["--steps", "3..4"], "there are those of steps 3: give others"),
    ],
)
def test_average_says_what_is_wrong(tmp_path: Path, arguments: list[object], message: str) -> None:
    make_run(tmp_path / "run")
    result = nextpt("average", tmp_path / "run", "--output", tmp_path / "mean", *arguments)
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert not (tmp_path / "mean").exists()
