"""`nextpt prep`: text to packed, tokenized shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.commands import prep_shards, prep_stored
from launcher.console import echo
from launcher.registration import add_command, add_group


def prep_stdlib(
    output: Annotated[Path, typer.Option(help="folder for code.jsonl and prose.jsonl")],
) -> None:
    """Collect the standard library of this Python as a corpus of code and prose."""
    from data_prep.stdlib_corpus import collect

    corpus = collect(output)
    for domain, count in corpus.documents.items():
        echo(f"{output}/{domain}.jsonl: {count:,} documents, {corpus.bytes[domain]:,} bytes")


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = add_group(app, "prep", help="Turn text into packed, tokenized shards.")
    prep_shards.register(group)
    add_command(group, "stdlib", prep_stdlib, example="nextpt prep stdlib --output data/stdlib")
    prep_stored.register(group)
