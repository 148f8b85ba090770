"""`nextpt checkpoint`: list, verify, fetch and average the checkpoints of a run or its mirror."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from launcher.console import console, echo
from launcher.options import Weights
from launcher.registration import add_command, add_group
from nextpt.base.errors import (
    EXIT_NO_VALID_CHECKPOINT,
    CheckpointError,
    NoValidCheckpointError,
    UserError,
)
from nextpt.base.files import expand_home

if TYPE_CHECKING:
    from nextpt.checkpoint.mirror.archive import Archive

T = TypeVar("T")
Location = Annotated[
    str,
    typer.Argument(
        metavar="LOCATION",
        help="run folder, such as runs/demo, or the URI of a mirror, such as s3://BUCKET/RUN",
    ),
]
MirrorLocation = Annotated[
    str,
    typer.Argument(metavar="LOCATION", help="URI of a mirror, such as s3://BUCKET/RUN"),
]
OnlyStep = Annotated[
    int | None, typer.Option("--step", help="only this step; the newest of several saves of it")
]


@dataclass(frozen=True)
class CheckpointRow:
    """One row of the table.

    Attributes:
        name: Name of the checkpoint's folder.
        step: Optimizer step at which it was saved.
        problem: Why it is not usable, or None.
        sequence: Number of the save in the run.
        bytes: Size of its files.
        loss: Loss of the last validation before it, nats per token.
    """

    name: str
    step: int
    problem: str | None
    sequence: int = 0
    bytes: int = 0
    loss: float | None = None


def list_checkpoints(location: Location) -> None:
    """List the checkpoints, newest first, without reading their files (see verify)."""
    location = expand_home(location)
    rows = list(_read_rows(location))
    if not rows:
        raise CheckpointError(f"{location} holds no checkpoint")
    _print_rows(rows, "complete")


def verify_checkpoints(location: Location, step: OnlyStep = None) -> None:
    """Read every file and compare it with the manifest.

    Exit codes: 0 all checkpoints are valid, 65 one is not, 2 there is none.
    """
    from nextpt.base.collective import RankGroup
    from nextpt.checkpoint.mirror.archive import ArchivedCheckpoint
    from nextpt.checkpoint.verification import verify_files

    location = expand_home(location)
    checked = []
    for row in _select(list(_read_rows(location)), step, location):
        problem = row.problem
        if problem is None and _is_mirror(location):
            verify = partial(_open_archive(location).problem, ArchivedCheckpoint(row.name, True))
            problem = _call_store(location, verify)
        elif problem is None:
            problem = verify_files(_checkpoints_folder(location) / row.name, RankGroup.world())
        checked.append(replace(row, problem=problem))
    _print_rows(checked, "valid")
    if any(row.problem for row in checked):
        raise typer.Exit(EXIT_NO_VALID_CHECKPOINT)


def fetch_checkpoint(
    location: MirrorLocation,
    output: Annotated[
        Path, typer.Option(help="run folder; the checkpoint goes to OUTPUT/checkpoints")
    ],
    step: OnlyStep = None,
) -> None:
    """Copy the newest valid checkpoint of a mirror into a run folder, verified.

    Exit codes: 0 it was copied, 65 there are checkpoints and none is valid, 2 another error.
    """
    from nextpt.base.collective import RankGroup
    from nextpt.checkpoint.mirror.archive import ArchivedCheckpoint
    from nextpt.checkpoint.mirror.restore import fetch

    location = expand_home(location)
    archive = _open_archive(location)
    for row in _select(list(_read_mirror_rows(location)), step, location):
        checkpoint = ArchivedCheckpoint(row.name, True)
        problem = row.problem or fetch(
            archive, checkpoint, output / "checkpoints", RankGroup.world()
        )
        if problem is None:
            size = f"{row.bytes / 1e6:,.1f} MB"
            echo(f"step {row.step} fetched to {output}/checkpoints, {size}, verified")
            return
        echo(f"warning: {row.name} is not usable: {problem}")
    of_step = "" if step is None else f" of step {step}"
    raise NoValidCheckpointError(f"{location} holds no valid checkpoint{of_step}")


def average_checkpoints(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder, such as runs/demo")],
    output: Annotated[Path, typer.Option(help="folder to write; it must not exist")],
    last: Annotated[int | None, typer.Option(min=2, help="number of newest checkpoints")] = None,
    steps: Annotated[
        str | None, typer.Option(metavar="FIRST..LAST", help="checkpoints of these steps instead")
    ] = None,
    weights: Weights = "weight",
) -> None:
    """Write the mean of checkpoints' weights, for eval, generate and export."""
    from nextpt.exchange import checkpoints_to_average, write_average

    if (last is None) == (steps is None):
        raise UserError("give either --last N or --steps FIRST..LAST, the checkpoints to average")
    chosen = checkpoints_to_average(run, last, _parse_span(steps) if steps else None)
    write_average(run, chosen, weights, output)
    echo(
        f"mean of {weights} of steps {', '.join(map(str, chosen))} written to {output}; next:"
        f" nextpt eval --run {output}"
    )


def _parse_span(text: str) -> tuple[int, int]:
    """Parse FIRST..LAST. Raises UserError."""
    first, separator, last = text.partition("..")
    if not (separator and first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise UserError(f"--steps {text} is not of the form FIRST..LAST, such as 4000..8000")
    return int(first), int(last)


def _is_mirror(location: str) -> bool:
    """Whether a location is a URI or a folder with a mirror's note."""
    from nextpt.base.stores import is_uri
    from nextpt.checkpoint.mirror.archive import NOTE

    return is_uri(location) or (Path(location) / NOTE).is_file()


def _open_archive(location: str) -> Archive:
    from nextpt.checkpoint.mirror.archive import Archive

    return Archive(location)


def _checkpoints_folder(location: str) -> Path:
    folder = Path(location) / "checkpoints"
    return folder if folder.is_dir() else Path(location)


def _read_rows(location: str) -> Iterator[CheckpointRow]:
    """Yield the checkpoints, newest first. Raises CheckpointError."""
    if _is_mirror(location):
        yield from _read_mirror_rows(location)
        return
    from nextpt.checkpoint.folders import list_checkpoints, step_of

    folder = _checkpoints_folder(location)
    if not folder.is_dir():
        raise CheckpointError(
            f"{location} is not a folder; expected a run folder or the URI of a mirror"
        )
    valid, damaged, unsupported = list_checkpoints(folder)
    for checkpoint in valid:
        manifest = checkpoint.manifest
        yield CheckpointRow(
            checkpoint.folder.name,
            manifest.step,
            None,
            manifest.sequence,
            manifest.bytes,
            manifest.loss,
        )
    for path, problem in (*damaged, *unsupported):
        yield CheckpointRow(path.name, step_of(path), problem)


def _read_mirror_rows(location: str) -> Iterator[CheckpointRow]:
    """Yield the checkpoints of a mirror, newest first."""
    from nextpt.checkpoint.errors import DamagedError, UnsupportedVersionError

    archive = _open_archive(location)
    for stored in _call_store(location, archive.checkpoints):
        try:
            manifest = _call_store(location, partial(archive.manifest, stored))
        except (DamagedError, UnsupportedVersionError) as problem:
            yield CheckpointRow(stored.name, stored.step, str(problem), stored.sequence)
        else:
            yield CheckpointRow(
                stored.name, stored.step, None, stored.sequence, manifest.bytes, manifest.loss
            )


def _call_store(location: str, call: Callable[[], T]) -> T:
    """Return the result of a call to an object store; its errors become user errors."""
    from nextpt.base.stores import STORE_ERRORS, store_problem

    try:
        return call()
    except STORE_ERRORS as error:
        raise store_problem(error, location) from error


def _select(rows: list[CheckpointRow], step: int | None, location: str) -> list[CheckpointRow]:
    """Return the rows of a step. Raises CheckpointError where there is none."""
    selected = [row for row in rows if step in (None, row.step)]
    if not selected:
        steps = ", ".join(str(row.step) for row in rows) or "none"
        of_step = "" if step is None else f" of step {step}"
        raise CheckpointError(f"{location} holds no checkpoint{of_step}; there are: {steps}")
    return selected


def _print_rows(rows: list[CheckpointRow], valid_state: str) -> None:
    """Print the table, and the problems below it.

    Args:
        rows: The checkpoints.
        valid_state: Text in the column "state" of checkpoints without a problem.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("step", "save", "MB", "val. loss"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("name", overflow="fold")
    for row in rows:
        table.add_row(
            str(row.step),
            str(row.sequence),
            f"{row.bytes / 1e6:,.1f}",
            "" if row.loss is None else f"{row.loss:.4f}",
            "not usable" if row.problem else valid_state,
            row.name,
        )
    console.print(table)
    for row in rows:
        if row.problem:
            echo(f"{row.name} is not usable: {row.problem}")


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = add_group(
        app, "checkpoint", help="Checkpoints of a run or of its mirror, see docs/reliability.md."
    )
    add_command(group, "list", list_checkpoints, example="nextpt checkpoint list runs/demo")
    add_command(
        group,
        "verify",
        verify_checkpoints,
        example="nextpt checkpoint verify s3://bucket/run --step 5000",
    )
    add_command(
        group,
        "fetch",
        fetch_checkpoint,
        example="nextpt checkpoint fetch s3://bucket/run --output runs/copy",
    )
    add_command(
        group,
        "average",
        average_checkpoints,
        example="nextpt checkpoint average runs/demo --last 5 --output runs/demo-average",
    )
