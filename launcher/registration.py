"""Registration of commands and command groups on the `nextpt` Typer application."""

from __future__ import annotations

import functools
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from nextpt.base.errors import DeprecatedNameWarning, UserError

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def add_command(
    app: typer.Typer,
    name: str,
    command: Callable[..., None],
    *,
    example: str = "",
    deprecated: Mapping[str, str] | None = None,
) -> None:
    """Add a command whose user errors end it with one line.

    Args:
        app: The application or the group that gets the command.
        name: Name of the command on the command line.
        command: Function whose annotated parameters are the options and whose docstring is the
            help text.
        example: One or more command lines, shown below the options.
        deprecated: Old name of a flag -> its name. Old names are accepted, with a warning, and not
            shown.
    """
    epilog = f"example: {example}" if example else None
    kind = type("Command", (_Command,), {"old_flags": deprecated or {}})
    app.command(name, cls=kind, epilog=epilog)(report_user_errors(command))


def add_group(app: typer.Typer, name: str, *, help: str) -> typer.Typer:
    """Add a group of commands and return it."""
    group = typer.Typer(no_args_is_help=True, help=help)
    app.add_typer(group, name=name)
    return group


class _Command(TyperCommand):
    """A command that accepts the old names of its flags, and finite numbers only."""

    old_flags: Mapping[str, str] = {}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line, old names replaced.

        Raises:
            typer.BadParameter: A number is infinite or NaN, which Python reads as numbers.
        """
        end = args.index("--") if "--" in args else len(args)
        renamed = [self._rename(argument) for argument in args[:end]]
        rest = super().parse_args(ctx, renamed + args[end:])
        for option in self.params:
            value = ctx.params.get(option.name or "")
            if isinstance(value, float) and not math.isfinite(value):
                raise typer.BadParameter(
                    f"{value} is not a finite number.", ctx, param_hint=f"'{option.opts[0]}'"
                )
        return rest

    def _rename(self, argument: str) -> str:
        flag, *value = argument.split("=", 1)
        if flag not in self.old_flags:
            return argument
        new = self.old_flags[flag]
        warnings.warn(
            f"{flag} is now {new}; its old name will soon be an error",
            DeprecatedNameWarning,
            stacklevel=2,
        )
        return "=".join([new, *value])


def report_user_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command so that a user error or an interrupt ends it with one line on stderr.

    A user error exits with the error's own code (2 unless it has another), an interrupt with 130.
    With NEXTPT_TRACEBACK=1 in the environment a user error keeps its traceback. In paths, ~ is the
    home folder.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **{name: _expand(value) for name, value in kwargs.items()})
        except UserError as error:
            if os.environ.get("NEXTPT_TRACEBACK"):
                raise
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            print(
                "\ninterrupted; no file is half-written, and the same command continues",
                file=sys.stderr,
                flush=True,
            )
            sys.exit(EXIT_INTERRUPTED)

    return run


def _expand(value: Any) -> Any:
    """Replace ~ in a path, or in each of a list of paths. Raises UserError."""
    from nextpt.base.files import expand_home

    if isinstance(value, Path):
        return Path(expand_home(str(value)))
    return [_expand(item) for item in value] if isinstance(value, list) else value
