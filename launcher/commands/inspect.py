"""`nextpt inspect`: a text as a model sees it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.console import console, echo, progress_bars
from launcher.registration import add_command

if TYPE_CHECKING:
    from nextpt.observe.inspection import Inspection


def inspect(
    run: Annotated[
        Path, typer.Option("--run", help="run folder, such as runs/demo, or a Hugging Face folder")
    ],
    text: Annotated[Path | None, typer.Option(help="file of UTF-8 text")] = None,
    prompt: Annotated[str | None, typer.Option(help="the text itself")] = None,
    step: Annotated[
        int | None, typer.Option(help="step of the checkpoint; the newest unless given")
    ] = None,
    heldout: Annotated[
        bool,
        typer.Option(
            "--heldout", help="calibration on the run's held-out documents, not on this text"
        ),
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="folder to write; RUN/inspect unless given")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="tokens in the table")] = 12,
) -> None:
    """Each token's probability, rank, entropy and alternatives, as a page coloured by surprise.

    And a calibration curve.
    """
    from nextpt.base.errors import UserError
    from nextpt.generate import pick_device
    from nextpt.observe.inspection import inspect_text, write_inspection

    if (text is None) == (prompt is None):
        raise UserError("give the text with one of --text FILE and --prompt TEXT")
    content = prompt if prompt is not None else _read(text)
    name = "the prompt" if text is None else str(text)
    if not content:
        raise UserError(f"{name} is empty: there is no token to look at")
    with progress_bars("reading") as progress:
        found = inspect_text(
            run, content, name, step=step, heldout=heldout, device=pick_device(), progress=progress
        )
    target = output or run / "inspect"
    write_inspection(found, target)
    _say(found, top)
    echo(f"written to {target}: tokens.html (open it in a browser), calibration.svg, inspect.json")


def _read(path: Path) -> str:
    from nextpt.base.errors import UserError

    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error.reason} at byte {error.start:,}") from error


def _say(found: Inspection, top: int) -> None:
    """The most surprising tokens, and the sums."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from nextpt.observe.inspection import visible

    table = Table(
        title=Text(f"the most surprising tokens of {found.source}"),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for heading in (
        "place",
        "before it",
        "token",
        "bits",
        "probability",
        "rank",
        "expected instead",
    ):
        table.add_column(
            heading,
            justify="left" if heading in ("token", "expected instead") else "right",
            no_wrap=True,
        )
    for place, t in found.most_surprising(top):
        before = "".join(b["text"] for b in found.tokens[max(place - 13, 0) : place - 1])[-24:]
        others = [_percent(a) for a in t["alternatives"] if a["id"] != t["id"]]
        table.add_row(
            f"{place:,}",
            Text(visible(before), style="dim"),
            Text(visible(t["token"]), style="bold"),
            f"{t['nats'] / math.log(2):.2f}",
            f"{t['probability']:.2g}",
            f"{t['rank']:,}",
            Text(", ".join(others[:2])),
        )
    console.print(table)
    figures = found.figures
    echo(
        f"{figures.tokens:,} tokens, {figures.bytes:,} bytes: {figures.nats_per_token:.3f} nats per"
        f" token, {figures.bpb:.3f} bits per byte"
    )
    echo("then it expects " + ", ".join(_percent(a) for a in found.following["alternatives"][:4]))
    echo(
        f"expected calibration error {found.calibration.top.expected_error:.3f} over"
        f" {found.calibration.places:,} places of {found.calibrated_on}"
    )


def _percent(alternative: dict[str, Any]) -> str:
    from nextpt.observe.inspection import visible

    return f"{visible(alternative['token'])} {100 * alternative['probability']:.1f} %"


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    add_command(
        app,
        "inspect",
        inspect,
        example="nextpt inspect --run runs/demo --text notes.txt    nextpt inspect --run runs/demo --prompt 'import os' --heldout",
    )
