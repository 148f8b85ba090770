"""Typer options and arguments that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="override keys of the file")
]
