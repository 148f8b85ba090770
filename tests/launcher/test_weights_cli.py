"""`--weights` of the commands that open a run: the weights of that name are asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli import app
from nextpt.evaluate.memorization.canaries import make_canaries, write_canaries
from tests.support.runs import make_run

COMMANDS = (
    "compress {file} --output {output}",
    "decompress {file} --output {output}",
    "eval --text {file}",
    "export hf --output {output}",
    "generate --prompt x",
    "inspect --text {file}",
    "memorization canaries {canaries}",
    "memorization contamination",
    "memorization extract",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    make_run(folder / "run")
    (folder / "file").write_text("words\n")
    write_canaries(make_canaries(1, 1, 0), folder / "canaries")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_weights_that_a_run_lacks_are_refused(folder: Path, command: str) -> None:
    paths = {name: folder / name for name in ("file", "output", "canaries")}
    arguments = [word.format(**paths) for word in command.split()]
    result = CliRunner().invoke(app, [*arguments, "--run", f"{folder}/run", "--weights", "ema-0.7"])
    assert result.exit_code == 2 and "no weights 'ema-0.7'; it has weight" in result.output
    assert not (folder / "output").exists()
