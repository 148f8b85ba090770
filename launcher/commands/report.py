"""`nextpt report`: one HTML page about one run or several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.console import echo
from launcher.registration import add_command


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="run folders; several are compared in one page"),
    ],
    output: Annotated[
        Path | None, typer.Option(help="file to write [default: RUN/report.html]")
    ] = None,
) -> None:
    """Write one HTML page about one run or several; it needs no network to open."""
    from nextpt.observe.report import default_output, write_report

    target = output or default_output(runs)
    write_report(runs, target)
    echo(f"written to {target}; open it in a browser")


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    add_command(
        app,
        "report",
        report,
        example=("nextpt report runs/demo    nextpt report runs/a runs/b --output compare.html"),
    )
