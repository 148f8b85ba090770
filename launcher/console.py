"""What the commands share: printing, tables, errors."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from data_prep.errors import PrepError
from nextpt.errors import UserError

out = Console(highlight=False, soft_wrap=True)


def friendly(command: Callable[..., Any]) -> Callable[..., Any]:
    """Mistakes of the user's end a command with one line and exit code 2 (or the error's own); NEXTPT_TRACEBACK=1 shows where.

    An interrupt ends it with one line and exit code 130: every command can be started again.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (UserError, PrepError) as error:
            if os.environ.get("NEXTPT_TRACEBACK"):
                raise
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(error.exit_code if isinstance(error, UserError) else 2)
        except KeyboardInterrupt:
            print("\ninterrupted; nothing is half-written, and the same command goes on", file=sys.stderr, flush=True)
            sys.exit(130)

    return run


def evaluation_table(result: dict[str, Any]) -> Table:
    """The figures of an evaluation, and below them the compressors' where they were measured."""
    table = Table(title=f"held-out documents, step {result['step']} (context {result['window']}, stride {result['stride']})",
                  box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("domain", no_wrap=True)
    for heading in ("tokens", "bytes", "nats/token", "bits/token", "perplexity", "bits/byte"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, f in (*result["domains"].items(), ("total", result["total"])):
        table.add_row(name, f"{f['tokens']:,}", f"{f['bytes']:,}", f"{f['nats_per_token']:.3f}", f"{f['bits_per_token']:.3f}",
                      f"{f['perplexity']:.2f}", f"{f['bpb_text']:.3f}")
    return table


def compressor_table(result: dict[str, Any]) -> Table:
    """Bits per byte of the model beside general-purpose compressors on the same bytes."""
    table = Table(title="bits per byte: all documents as one stream / document by document", box=box.SIMPLE_HEAD,
                  title_justify="left", pad_edge=False)
    table.add_column("", no_wrap=True)
    domains = result["domains"]
    for name in domains:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("this model", *(f"{f['bpb_text']:.3f}" for f in domains.values()), style="bold")
    for compressor in next(iter(domains.values()))["compressors"]:
        cells = (f["compressors"][compressor] for f in domains.values())
        table.add_row(compressor, *(f"{c['bpb_concatenated']:.3f} / {c['bpb_documents']:.3f}" for c in cells))
    return table


def small_table(title: str, headings: list[str], rows: list[list[str]]) -> Table:
    """A table whose first column is text and whose others are figures."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


@contextmanager
def shares_progress(verb: str) -> Iterator[Callable[[str, float], None]]:
    """A bar per thing (domain, side) that hears the share that is done, on a terminal; elsewhere a line when one is done."""
    with Progress(TextColumn(verb + " {task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=out,
                  disable=not out.is_terminal) as progress:
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
