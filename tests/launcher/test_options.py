"""Values of options that several commands share."""

from __future__ import annotations

from typing import get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from launcher.cli import app
from launcher.options import parse_sizes
from nextpt.base.errors import ConfigError
from tests.launcher.test_deprecated_flags import COMMANDS

FLOATS = [
    (words, option.opts[0])
    for words, command in COMMANDS.items()
    if command.callback
    for option in command.params
    if get_type_hints(command.callback).get(option.name) in (float, float | None)
]


def test_sizes_are_sorted_and_each_comes_once() -> None:
    assert parse_sizes("--prefixes", "64, 16,64") == [16, 64]


@pytest.mark.parametrize("text", ["", "16,", "0,16", "-1", "1.5", "16 32"])
def test_sizes_are_whole_numbers_above_0(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--prefixes .*: expected whole numbers above 0"):
        parse_sizes("--prefixes", text)


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e999"])
@pytest.mark.parametrize(("command", "flag"), FLOATS)
def test_numbers_are_finite(command: str, flag: str, value: str) -> None:
    context, required = typer.Context(COMMANDS[command]), []
    for option in COMMANDS[command].params:
        if option.required and flag not in option.opts:
            required += [*option.opts[:1], "1"] if option.opts[0].startswith("-") else ["1"]
    with pytest.raises(typer.BadParameter, match=r"finite number|or equal to"):
        COMMANDS[command].parse_args(context, [*required, f"{flag}={value}"])


def test_a_number_that_is_not_finite_is_a_user_error() -> None:
    result = CliRunner().invoke(app, ["scaling", "predict", "f.json", "--params=inf", "--tokens=1"])
    assert result.exit_code == 2 and "'--params': inf is not a finite number" in result.output
