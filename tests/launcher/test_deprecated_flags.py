"""Old names of flags: accepted with one warning line, and not shown."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from launcher.cli import app
from launcher.registration import report_user_errors
from nextpt.base.errors import DeprecatedNameWarning

ROOT = Path(__file__).parents[2]
RENAMED = {
    "prep shards --heldout": "--validation-fraction",
    "inspect --heldout": "--validation",
    "eval --rows": "--batch-size",
    "eval --stretches": "--continuations",
    "compress --rows": "--sequences",
    "compress --given": "--dictionary",
    "tokenizer convert --start": "--start-token",
    "tokenizer convert --end": "--end-token",
    "tokenizer show --start": "--start-token",
    "tokenizer show --end": "--end-token",
}


def commands(group: object, words: tuple[str, ...] = ()) -> Iterator[tuple[str, object]]:
    """Every command with its words, of all groups."""
    for name, command in getattr(group, "commands", {}).items():
        yield " ".join((*words, name)), command
        yield from commands(command, (*words, name))


COMMANDS = dict(commands(typer.main.get_command(app)))


def test_every_old_flag_has_a_name_that_its_command_knows() -> None:
    declared = {}
    for words, command in COMMANDS.items():
        for old, new in getattr(command, "old_flags", {}).items():
            flags = [flag for parameter in command.params for flag in parameter.opts]
            assert new in flags and old not in flags
            declared[f"{words} {old}"] = new
    assert declared == RENAMED


@pytest.mark.parametrize("argument", ["--rows=5", "--rows 5"])
def test_an_old_flag_is_the_new_one_with_a_warning(argument: str) -> None:
    context = typer.Context(COMMANDS["eval"], info_name="eval")
    with pytest.warns(DeprecatedNameWarning, match="--rows is now --batch-size; ") as caught:
        COMMANDS["eval"].parse_args(context, argument.split())
    assert len(caught) == 1 and context.params["batch_size"] == 5


def test_the_home_folder_in_every_path_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/user")
    received = {}

    def command(path: Path, paths: list[Path], text: str) -> None:
        received.update(path=path, paths=paths, text=text)

    report_user_errors(command)(path=Path("~/x"), paths=[Path("~"), Path("/x/~")], text="~/x")
    assert received == {
        "path": Path("/home/of/user/x"),
        "paths": [Path("/home/of/user"), Path("/x/~")],
        "text": "~/x",
    }


def test_nothing_behind_two_dashes_is_a_flag() -> None:
    context = typer.Context(COMMANDS["compress"], info_name="compress")
    COMMANDS["compress"].parse_args(context, ["--run", "r", "--output", "o", "--", "--rows"])
    assert context.params["file"] == Path("--rows")


def test_old_flags_are_not_shown() -> None:
    result = CliRunner().invoke(app, ["eval", "--help"])
    assert "--batch-size" in result.output and "--rows" not in result.output


@pytest.mark.process
def test_the_warning_is_one_line() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "launcher.cli", "inspect", "--run", "none", "--heldout"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    warning, error = result.stderr.splitlines()
    assert warning.startswith("warning: --heldout is now --validation; ")
    assert error.startswith("error: ")
