"""What the commands share: printing, tables, errors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text


class _Console(Console):
    """Cuts no figure off: a table that is wider than the terminal is written in full, and the terminal wraps its lines."""

    def print(self, *objects: Any, **options: Any) -> None:
        given = self._width
        for table in objects:
            if isinstance(table, Table):
                self.width = max(self.width, self._needed(table))
        try:
            super().print(*objects, **options)
        finally:
            self._width = given

    def _needed(self, table: Table) -> int:
        free = self.options.update(max_width=10_000)
        for column in table.columns:
            if column.no_wrap:  # which rich cuts all the same
                column.min_width = max(
                    Measurement.get(self, free, cell).maximum
                    for cell in (column.header, *column.cells)
                )
        return Measurement.get(self, free, table).minimum


out = _Console(highlight=False, soft_wrap=True)


def evaluation_table(result: dict[str, Any]) -> Table:
    """The figures of an evaluation, bits per byte with half the width of their interval."""
    of = "" if result["step"] is None else f", step {result['step']}"
    table = _table(
        f"loss on whole documents{of} (context {result['window']}, stride {result['stride']})",
        "domain",
        "tokens",
        "bytes",
        "nats/token",
        "perplexity",
        "bits/byte",
        "ends paid",
    )
    for name, f in (*result["domains"].items(), ("total", result["total"])):
        table.add_row(
            name,
            f"{f['tokens']:,}",
            f"{f['bytes']:,}",
            f"{f['nats_per_token']:.3f}",
            f"{f['perplexity']:.2f}",
            _with_interval(f["bpb"], f["intervals"]["bpb"]),
            f"{f['bpb_with_eod']:.3f}",
        )
    return table


def context_table(result: dict[str, Any]) -> Table:
    """Loss by how much the model saw before the token."""
    table = _table("by tokens of context", "context", "tokens", "nats/token", "95 %")
    for row in result["by_context"]:
        name = (
            f"{row['from']:,}" if row["from"] == row["to"] else f"{row['from']:,} to {row['to']:,}"
        )
        table.add_row(
            name, f"{row['tokens']:,}", f"{row['nats_per_token']:.3f}", _interval(row["interval"])
        )
    return table


def frequency_table(result: dict[str, Any]) -> Table:
    """Loss by how frequent the token is."""
    table = _table(
        f"by share of the token among all tokens of the {result['by_frequency']['counted_in']}",
        "share",
        "tokens",
        "nats/token",
        "95 %",
    )
    for row in result["by_frequency"]["bands"]:
        table.add_row(
            band_name(row),
            f"{row['tokens']:,}",
            f"{row['nats_per_token']:.3f}",
            _interval(row["interval"]),
        )
    return table


def band_name(row: dict[str, Any]) -> str:
    """Of a row of by_frequency."""
    if row["to"] == 0:
        return "never"
    low, high = (f"1 in {round(1 / row[end]):,}" if row[end] else "" for end in ("from", "to"))
    return (
        f"below {high}"
        if not row["from"]
        else f"above {low}"
        if row["to"] == 1
        else f"{low} to {high}"
    )


def curve_table(result: dict[str, Any]) -> Table:
    """Bits per byte of every checkpoint."""
    table = _table("bits/byte at every checkpoint", "step", *result["domains"], "total")
    for at in result["checkpoints"]:
        table.add_row(
            f"{at['step']:,}",
            *(
                _with_interval(f["bpb"], f["intervals"]["bpb"])
                for f in (*at["domains"].values(), at["total"])
            ),
        )
    return table


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(
        title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _with_interval(value: float, interval: list[float] | None) -> str:
    return f"{value:.3f}" + (f" ±{(interval[1] - interval[0]) / 2:.3f}" if interval else "")


def _interval(interval: list[float] | None) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""


def compressor_table(result: dict[str, Any]) -> Table:
    """Bits per byte of the model beside general-purpose compressors on the same bytes."""
    table = Table(
        title="bits per byte: all documents as one stream / document by document",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    domains = result["domains"]
    for name in domains:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("this model", *(f"{f['bpb']:.3f}" for f in domains.values()), style="bold")
    for compressor in next(iter(domains.values()))["compressors"]:
        cells = (f["compressors"][compressor] for f in domains.values())
        table.add_row(
            compressor, *(f"{c['bpb_concatenated']:.3f} / {c['bpb_documents']:.3f}" for c in cells)
        )
    return table


def small_table(title: str, headings: list[str], rows: list[list[str]]) -> Table:
    """A table whose first column is text and whose others are figures."""
    table = Table(
        title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0)
    )
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


@contextmanager
def shares_progress(verb: str) -> Iterator[Callable[[str, float], None]]:
    """A bar per thing (domain, side) that hears the share that is done, on a terminal.

    Elsewhere a line when one is done.
    """
    with Progress(
        TextColumn(verb + " {task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=out,
        disable=not out.is_terminal,
    ) as progress:
        tasks: dict[str, TaskID] = {}

        def update(domain: str, share: float) -> None:
            if domain not in tasks:
                tasks[domain] = progress.add_task(domain, total=1.0)
            progress.update(tasks[domain], completed=share)
            if share >= 1 and not out.is_terminal:
                say(f"{verb} {domain}: done")

        yield update


def say(text: str = "") -> None:
    """A line for the person, at once."""
    out.print(text, markup=False)
    sys.stdout.flush()


STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "bold red"}


def say_finding(subject: str, status: str, found: str, advice: str) -> None:
    """One finding of the doctor's; its advice below it, under an arrow."""
    out.print(Text.assemble((f"{status:<8}", STYLES[status]), f" {subject}: {found}"))
    if advice:
        out.print(Text(f"         -> {advice}", style="dim" if status == "note" else ""))
