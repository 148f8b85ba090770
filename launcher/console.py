"""Console output shared by the commands: lines, tables, progress bars."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

if TYPE_CHECKING:
    from rich.progress import TaskID

STATUS_STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "bold red"}


class WideTableConsole(Console):
    """Console that never truncates a cell.

    A table wider than the terminal is printed in full and the terminal wraps its lines.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        """Print objects as rich does, with the width that the widest table needs."""
        terminal_width = self._width
        for table in objects:
            if isinstance(table, Table):
                self.width = max(self.width, self._minimum_width(table))
        try:
            super().print(*objects, **options)
        finally:
            self._width = terminal_width

    def _minimum_width(self, table: Table) -> int:
        unlimited = self.options.update(max_width=10_000)
        for column in table.columns:
            if column.no_wrap:  # rich truncates these columns too
                column.min_width = max(
                    Measurement.get(self, unlimited, cell).maximum
                    for cell in (column.header, *column.cells)
                )
        return Measurement.get(self, unlimited, table).minimum


console = WideTableConsole(highlight=False, soft_wrap=True)


def echo(text: str = "") -> None:
    """Print a line without markup and flush it."""
    console.print(text, markup=False)
    sys.stdout.flush()


def echo_finding(subject: str, status: str, observed: str, advice: str) -> None:
    """Print one finding of the doctor, with its advice on the next line."""
    from rich.text import Text

    console.print(Text.assemble((f"{status:<8}", STATUS_STYLES[status]), f" {subject}: {observed}"))
    if advice:
        console.print(Text(f"         -> {advice}", style="dim" if status == "note" else ""))


def build_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]] = ()) -> Table:
    """Build a table whose first column is text and whose other columns are numbers."""
    table = Table(
        title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0)
    )
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def format_interval(interval: Sequence[float] | None, spec: str = ".3f") -> str:
    """Format an interval as "low to high"; empty where there is none."""
    return f"{interval[0]:{spec}} to {interval[1]:{spec}}" if interval else ""


def format_half_width(
    value: float, interval: Sequence[float] | None, digits: int = 3, sign: str = ""
) -> str:
    """Format a value with half the width of its interval: "1.234 ±0.056"."""
    half_width = f" ±{(interval[1] - interval[0]) / 2:.{digits}f}" if interval else ""
    return f"{value:{sign}.{digits}f}{half_width}"


@contextmanager
def progress_bars(verb: str) -> Iterator[Callable[[str, float], None]]:
    """Show one progress bar per item (a domain, a file, a checkpoint).

    Without a terminal a line is printed when an item is complete.

    Args:
        verb: Printed before the name of each item.

    Yields:
        A function that takes the name of an item and the fraction that is complete.
    """
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    with Progress(
        TextColumn(verb + " {task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        tasks: dict[str, TaskID] = {}

        def update(item: str, fraction: float) -> None:
            if item not in tasks:
                tasks[item] = progress.add_task(item, total=1.0)
            progress.update(tasks[item], completed=fraction)
            if fraction >= 1 and not console.is_terminal:
                echo(f"{verb} {item}: done")

        yield update
