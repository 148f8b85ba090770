"""`nextpt checkpoint`: look at the checkpoints of a run or of its mirror, prove them whole, fetch one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich import box
from rich.table import Table

from launcher.console import console, echo
from launcher.registration import add_command, add_group
from nextpt.base.errors import EXIT_NO_VALID_CHECKPOINT, CheckpointError
from nextpt.base.stores import STORE_ERRORS, is_uri, store_problem

T = TypeVar("T")
Place = Annotated[
    str,
    typer.Argument(
        help="run folder, such as runs/demo, or the address of a mirror, such as s3://BUCKET/RUN"
    ),
]
Step = Annotated[
    int | None, typer.Option(help="of this step only; the newest where there are several")
]


@dataclass(frozen=True)
class Row:
    """One checkpoint: what its manifest says, or what is wrong with it. loss: of the last validation, nats per token."""

    name: str
    step: int
    problem: str | None
    sequence: int = 0
    bytes: int = 0
    loss: float | None = None


def list_checkpoints(place: Place) -> None:
    """A table of the checkpoints, newest first. Their files are not read: see verify."""
    rows = list(_rows(place))
    if not rows:
        raise CheckpointError(f"{place} holds no checkpoint")
    _show(rows, "complete")


def verify_checkpoints(place: Place, step: Step = None) -> None:
    """Read every file and compare it with the manifest.

    Exit codes: 0 all are whole, 65 one is not, 2 there is none.
    """
    from nextpt.base.collective import RankGroup
    from nextpt.checkpoint.commit import intact
    from nextpt.checkpoint.mirror.archive import ArchivedCheckpoint

    rows = _of_step(list(_rows(place)), step, place)
    checked = []
    for row in rows:
        problem = row.problem
        if problem is None and _is_mirror(place):
            problem = _asked(
                place, lambda row=row: _archive(place).problem(ArchivedCheckpoint(row.name, True))
            )
        elif problem is None:
            problem = intact(_root(place) / row.name, RankGroup.world())
        checked.append(replace(row, problem=problem))
    _show(checked, "whole")
    if any(row.problem for row in checked):
        raise typer.Exit(EXIT_NO_VALID_CHECKPOINT)


def fetch_checkpoint(
    place: Annotated[str, typer.Argument(help="address of a mirror, such as s3://BUCKET/RUN")],
    output: Annotated[
        Path, typer.Option(help="run folder that gets the checkpoint, in OUTPUT/checkpoints")
    ],
    step: Step = None,
) -> None:
    """Copy the newest whole checkpoint of a mirror, or that of a step, into a run folder, and verify it on the way.

    Exit codes: 0 it is there, 65 there are some and none is whole, 2 another mistake.
    """
    from nextpt.base.collective import RankGroup
    from nextpt.base.errors import NoValidCheckpointError
    from nextpt.checkpoint.mirror.archive import ArchivedCheckpoint
    from nextpt.checkpoint.mirror.restore import fetch

    for row in _of_step(list(_rows(place, mirror=True)), step, place):
        problem = row.problem or fetch(
            _archive(place),
            ArchivedCheckpoint(row.name, True),
            output / "checkpoints",
            RankGroup.world(),
        )
        if problem is None:
            echo(
                f"step {row.step} fetched to {output}/checkpoints, {row.bytes / 1e6:,.1f} MB,"
                " verified"
            )
            return
        echo(f"warning: {row.name} is not usable: {problem}")
    raise NoValidCheckpointError(
        f"{place} holds no whole checkpoint{'' if step is None else f' of step {step}'}"
    )


def _is_mirror(place: str) -> bool:
    """Whether a place is a mirror: an address, or a folder with its note."""
    from nextpt.checkpoint.mirror.archive import NOTE

    return is_uri(place) or (Path(place) / NOTE).is_file()


def _archive(place: str):
    from nextpt.checkpoint.mirror.archive import Archive

    return Archive(place)


def _root(place: str) -> Path:
    inner = Path(place) / "checkpoints"
    return inner if inner.is_dir() else Path(place)


def _rows(place: str, mirror: bool = False) -> Iterator[Row]:
    """Newest first. Raises CheckpointError where the place cannot be read."""
    if mirror or _is_mirror(place):
        yield from _rows_of_mirror(place)
        return
    from nextpt.checkpoint.folders import list_checkpoints, step_of

    if not _root(place).is_dir():
        raise CheckpointError(
            f"{place} is not a folder; expected a run folder or the address of a mirror"
        )
    found, damaged, foreign = list_checkpoints(_root(place))
    for one in found:
        yield Row(
            one.folder.name,
            one.manifest.step,
            None,
            one.manifest.sequence,
            one.manifest.bytes,
            one.manifest.loss,
        )
    for folder, problem in (*damaged, *foreign):
        yield Row(folder.name, step_of(folder), problem)


def _rows_of_mirror(place: str) -> Iterator[Row]:
    from nextpt.checkpoint.manifest import DamagedError, UnsupportedVersionError

    archive = _archive(place)
    for one in _asked(place, archive.checkpoints):
        try:
            manifest = _asked(place, lambda one=one: archive.manifest(one))
        except (DamagedError, UnsupportedVersionError) as problem:
            yield Row(one.name, one.step, str(problem), one.sequence)
        else:
            yield Row(one.name, one.step, None, one.sequence, manifest.bytes, manifest.loss)


def _asked(place: str, action: Callable[[], T]) -> T:
    """What a store answers. Raises DataPrepError when it does not."""
    try:
        return action()
    except STORE_ERRORS as error:
        raise store_problem(error, place) from error


def _of_step(rows: list[Row], step: int | None, place: str) -> list[Row]:
    chosen = [row for row in rows if step in (None, row.step)]
    if not chosen:
        steps = ", ".join(str(row.step) for row in rows) or "none"
        raise CheckpointError(
            f"{place} holds no checkpoint{'' if step is None else f' of step {step}'}; there are:"
            f" {steps}"
        )
    return chosen


def _show(rows: list[Row], good: str) -> None:
    """A table, and below it what is wrong. good: the state of those with which nothing is."""
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
            "not usable" if row.problem else good,
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
