"""`nextpt compress` and `decompress`: round trips, and refusals that leave no output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli import app
from tests.support.runs import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    make_run(folder)
    return folder


def nextpt(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.output


@pytest.mark.thorough
def test_a_file_round_trips(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes("words and bytes \xff\n".encode("latin-1") * 6)
    code, output = nextpt(
        "compress",
        file,
        "--run",
        run,
        "--output",
        tmp_path / "coded",
        "--dictionary",
        file,
        "--json",
        tmp_path / "figures.json",
    )
    assert code == 0 and "this model" in output and "zstd -22" in output, output
    sizes = json.loads((tmp_path / "figures.json").read_text())
    assert (
        sizes["total"] == sizes["payload"] + sizes["header"] == (tmp_path / "coded").stat().st_size
    )
    code, output = nextpt(
        "decompress", tmp_path / "coded", "--run", run, "--output", tmp_path / "back"
    )
    assert code == 0 and (tmp_path / "back").read_bytes() == file.read_bytes(), output


@pytest.mark.thorough
def test_an_empty_file(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert (
        nextpt("compress", tmp_path / "empty", "--run", run, "--output", tmp_path / "coded")[0] == 0
    )
    assert (
        nextpt("decompress", tmp_path / "coded", "--run", run, "--output", tmp_path / "back")[0]
        == 0
    )
    assert (tmp_path / "back").read_bytes() == b""


@pytest.mark.thorough
@pytest.mark.parametrize(
    "command", [["compress", "missing"], ["decompress", "missing"], ["decompress", "foreign"]]
)
def test_a_refused_file_leaves_no_output(command: list[str], run: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign").write_bytes(b"PK\3\4")
    code, _ = nextpt(command[0], tmp_path / command[1], "--run", run, "--output", tmp_path / "out")
    assert code == 2 and not (tmp_path / "out").exists()


@pytest.mark.thorough
def test_a_hugging_face_folder_serves_as_the_model(run: Path, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    assert nextpt("export", "hf", "--run", run, "--output", exported)[0] == 0
    (tmp_path / "file").write_bytes(b"some words")
    code, output = nextpt(
        "compress", tmp_path / "file", "--run", exported, "--output", tmp_path / "coded"
    )
    assert code == 0, output
    code, output = nextpt(
        "decompress", tmp_path / "coded", "--run", exported, "--output", tmp_path / "back"
    )
    assert code == 0 and (tmp_path / "back").read_bytes() == b"some words", output
    code, output = nextpt("generate", "--run", exported, "--prompt", "a", "--max-tokens", 3)
    assert code == 0, output
    assert nextpt("generate", "--run", exported, "--save")[0] == 2
    code, output = nextpt(
        "inspect", "--run", exported, "--prompt", "some words", "--output", tmp_path / "page"
    )
    assert code == 0 and "at step" not in (tmp_path / "page" / "tokens.html").read_text(), output
    assert nextpt("inspect", "--run", exported, "--prompt", "some words", "--validation")[0] == 2


@pytest.mark.parametrize("output", ["nowhere/out", ".", "file"])
def test_an_unwritable_output_is_reported_first(run: Path, tmp_path: Path, output: str) -> None:
    (tmp_path / "file").write_bytes(b"some words")
    code, _ = nextpt("compress", tmp_path / "file", "--run", run, "--output", tmp_path / output)
    assert code == 2 and (tmp_path / "file").read_bytes() == b"some words"
