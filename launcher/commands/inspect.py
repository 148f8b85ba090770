"""`nextpt inspect`: probability, rank, entropy and alternatives of each token of a text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.console import console, echo, progress_bars
from launcher.options import RunOrModelFolder, Step, Weights
from launcher.registration import add_command
from nextpt.base.errors import UserError

if TYPE_CHECKING:
    from nextpt.observe.inspection import Inspection

HEADINGS = ("position", "before it", "token", "bits", "probability", "rank", "expected instead")
LEFT_ALIGNED = ("token", "expected instead")
CONTEXT_TOKENS, CONTEXT_CHARACTERS = 13, 24  # in the column "before it"


def inspect(
    run: RunOrModelFolder,
    text: Annotated[Path | None, typer.Option(help="UTF-8 file to inspect")] = None,
    prompt: Annotated[str | None, typer.Option(help="text to inspect")] = None,
    step: Step = None,
    weights: Weights = "weight",
    validation: Annotated[
        bool,
        typer.Option(
            "--validation", help="calibration on the run's held-out documents, not on this text"
        ),
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="folder to write [default: RUN/inspect]")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="rows of the printed table")] = 12,
) -> None:
    """Show how a model predicts each token of a text, and how well it is calibrated.

    Writes a page with every token coloured by its surprisal, and a calibration plot.
    """
    from nextpt.generate import pick_device
    from nextpt.observe.inspection import inspect_text, write_inspection

    content, name = _read_input(text, prompt)
    with progress_bars("reading") as progress:
        inspection = inspect_text(
            run,
            content,
            name,
            step=step,
            weights=weights,
            validation=validation,
            device=pick_device(),
            progress=progress,
        )
    target = output or run / "inspect"
    write_inspection(inspection, target)
    _print_inspection(inspection, top)
    echo(f"written to {target}: tokens.html (open it in a browser), calibration.svg, inspect.json")


def _read_input(text: Path | None, prompt: str | None) -> tuple[str, str]:
    """Return the text and its name. Raises UserError."""
    if text is not None and prompt is None:
        content, name = _read_text(text), str(text)
    elif prompt is not None and text is None:
        content, name = prompt, "the prompt"
    else:
        raise UserError("give the text with one of --text FILE and --prompt TEXT")
    if not content:
        raise UserError(f"{name} is empty: it has no token to inspect")
    return content, name


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error.reason} at byte {error.start:,}") from error


def _print_inspection(inspection: Inspection, top: int) -> None:
    """Print the most surprising tokens and the metrics of the whole text."""
    _print_most_surprising(inspection, top)
    metrics = inspection.metrics
    echo(
        f"{metrics.tokens:,} tokens, {metrics.bytes:,} bytes: {metrics.nats_per_token:.3f} nats per"
        f" token, {metrics.bpb:.3f} bits per byte"
    )
    following = ", ".join(_format_alternative(a) for a in inspection.following["alternatives"][:4])
    echo(f"next token: {following}")
    echo(
        f"expected calibration error {inspection.calibration.top.expected_error:.3f} over"
        f" {inspection.calibration.positions:,} positions of {inspection.calibrated_on}"
    )


def _print_most_surprising(inspection: Inspection, top: int) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from nextpt.observe.inspection import visible

    table = Table(
        title=Text(f"the most surprising tokens of {inspection.source}"),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for heading in HEADINGS:
        is_left = heading in LEFT_ALIGNED
        table.add_column(heading, justify="left" if is_left else "right", no_wrap=True)
    for position, token in inspection.most_surprising(top):
        context = inspection.tokens[max(position - CONTEXT_TOKENS, 0) : position - 1]
        before = "".join(t["text"] for t in context)[-CONTEXT_CHARACTERS:]
        others = [_format_alternative(a) for a in token["alternatives"] if a["id"] != token["id"]]
        table.add_row(
            f"{position:,}",
            Text(visible(before), style="dim"),
            Text(visible(token["token"]), style="bold"),
            f"{token['nats'] / math.log(2):.2f}",
            f"{token['probability']:.2g}",
            f"{token['rank']:,}",
            Text(", ".join(others[:2])),
        )
    console.print(table)


def _format_alternative(alternative: dict[str, Any]) -> str:
    from nextpt.observe.inspection import visible

    return f"{visible(alternative['token'])} {100 * alternative['probability']:.1f} %"


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    add_command(
        app,
        "inspect",
        inspect,
        example=(
            "nextpt inspect --run runs/demo --text notes.txt    nextpt inspect --run runs/demo"
            " --prompt 'import os' --validation"
        ),
        deprecated={"--heldout": "--validation"},
    )
