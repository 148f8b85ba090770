"""`nextpt prep shards`: corpora to a dataset folder, on this machine, in a Slurm job array, or on a Ray cluster."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.console import console, echo
from launcher.registration import add_command
from nextpt.base.errors import UserError

if TYPE_CHECKING:
    from data_prep.spec import PrepSpec
    from data_prep.workers import Workers

WHAT, WHERE, HOW = "What comes in", "Where the work is done", "What comes out"


def prep_shards(
    domains: Annotated[
        list[str],
        typer.Argument(
            metavar="DOMAIN=PLACE...",
            help=(
                "files, folders, globs or URIs (s3://bucket/web/) of .jsonl, .txt (also .gz, .zst)"
                " and .parquet"
            ),
        ),
    ],
    output: Annotated[Path, typer.Option(help="dataset folder to write")],
    sequence_length: Annotated[
        int, typer.Option(help="inputs per row, tokens", rich_help_panel=HOW)
    ],
    vocab_size: Annotated[
        int | None, typer.Option(help="train a byte-level BPE tokenizer of this size")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help=(
                "or take this one: tokenizer.json, what `nextpt tokenizer convert` reads, or the"
                " name of a tiktoken encoding"
            )
        ),
    ] = None,
    characters: Annotated[
        bool, typer.Option("--characters", help="or make every character a token")
    ] = False,
    encoder: Annotated[
        str,
        typer.Option(
            help=(
                "library that encodes: tiktoken, tokenizers, or auto: tiktoken where both are"
                " proved equal"
            )
        ),
    ] = "auto",
    start_token: Annotated[
        str | None,
        typer.Option(help="special token before each document; the tokenizer's own unless given"),
    ] = None,
    end_token: Annotated[str | None, typer.Option(help="special token after each document")] = None,
    text_field: Annotated[
        str,
        typer.Option(
            help="key or column of the text; dots go down: data.text", rich_help_panel=WHAT
        ),
    ] = "text",
    id_field: Annotated[
        str,
        typer.Option(help="key or column of the id; '' when there is none", rich_help_panel=WHAT),
    ] = "id",
    domain_field: Annotated[
        str | None,
        typer.Option(
            help="key or column of the domain; DOMAIN then names a place only", rich_help_panel=WHAT
        ),
    ] = None,
    min_bytes: Annotated[
        int, typer.Option(help="pass over shorter documents", rich_help_panel=WHAT)
    ] = 1,
    max_bytes: Annotated[
        int, typer.Option(help="pass over longer documents", rich_help_panel=WHAT)
    ] = 2**26,
    duplicates: Annotated[
        str,
        typer.Option(
            help="documents with the text of an earlier one: keep or drop", rich_help_panel=WHAT
        ),
    ] = "keep",
    max_bad_fraction: Annotated[
        float,
        typer.Option(help="share of bad records above which nothing is made", rich_help_panel=WHAT),
    ] = 1e-4,
    heldout: Annotated[
        float, typer.Option(help="share kept for evaluation", rich_help_panel=HOW)
    ] = 0.05,
    split: Annotated[
        str,
        typer.Option(
            help="hash: that share of the documents; tail: of each domain's end",
            rich_help_panel=HOW,
        ),
    ] = "hash",
    packing: Annotated[
        str,
        typer.Option(
            help="best_fit, concat (and chunk), or single (one document a row)", rich_help_panel=HOW
        ),
    ] = "best_fit",
    compression: Annotated[
        str | None, typer.Option(help="of shards: zstd or zstd:LEVEL", rich_help_panel=HOW)
    ] = None,
    seed: Annotated[int, typer.Option(help="order of rows", rich_help_panel=HOW)] = 0,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="replace a dataset, or drop unfinished work, made otherwise"
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would be done and how long it would take")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="processes; one per core unless given", rich_help_panel=WHERE),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="this is task I of N that share the work (0/8), as in a job array",
            rich_help_panel=WHERE,
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="work on a Ray cluster: its address, auto, or local",
            rich_help_panel=WHERE,
        ),
    ] = None,
) -> None:
    """Split, tokenize, pack and write MDS shards.

    The same command goes on where an earlier one was stopped. OUTPUT/report.html tells what is in
    the dataset.
    """
    from data_prep.prepare import prepare, summary_table
    from data_prep.spec import PrepSpec

    spec = PrepSpec(
        domains=named_places(domains),
        output=output,
        sequence_length=sequence_length,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        characters=characters,
        encoder=one_of("encoder", encoder, ("auto", "tiktoken", "tokenizers")),
        start_token=start_token,
        end_token=end_token,
        heldout=heldout,
        split=split,
        seed=seed,
        text_field=text_field,
        id_field=id_field or None,
        domain_field=domain_field,
        packing=packing,
        compression=compression,
        min_bytes=min_bytes,
        max_bytes=max_bytes,
        duplicates=duplicates,
        max_bad_fraction=max_bad_fraction,
    )
    if dry_run:
        say_dry_run(spec, workers)
        return
    chosen = choose_workers(workers, task, ray)
    console.print(
        summary_table(
            prepare(spec, overwrite=overwrite, console=console, workers=chosen, alone=task is None)
        )
    )
    echo(f"report: {output}/report.html")


def named_places(arguments: list[str]) -> dict[str, str]:
    """DOMAIN=PLACE arguments as a dict. Raises UserError."""
    named: dict[str, str] = {}
    for item in arguments:
        name, equals, place = item.partition("=")
        if not equals or not place or name in named:
            raise UserError(f"{item!r}: expected DOMAIN=PLACE, each domain once")
        named[name] = place
    return named


def one_of(option: str, value: str, known: tuple[str, ...]) -> str:
    """The value. Raises UserError when it is none of those known."""
    if value not in known:
        raise UserError(f"--{option} {value}: expected {', '.join(known[:-1])} or {known[-1]}")
    return value


def choose_workers(workers: int | None, task: str | None, ray: str | None) -> Workers | None:
    """Where to work; None leaves it to the size of the work. Raises UserError."""
    import os

    from data_prep.workers import LocalWorkers, RayWorkers

    if ray is not None and task is not None:
        raise UserError("--ray and --task exclude each other")
    if ray is not None:
        return RayWorkers(None if ray == "local" else ray, workers)
    if task is None:
        return LocalWorkers(workers) if workers else None
    matched = re.fullmatch(r"(\d+)/(\d+)", task)
    if not matched or not int(matched[1]) < int(matched[2]):
        raise UserError(f"--task {task}: expected I/N with I from 0 to N - 1")
    return LocalWorkers(workers or len(os.sched_getaffinity(0)), int(matched[1]), int(matched[2]))


def say_dry_run(spec: PrepSpec, workers: int | None) -> None:
    """What a preparation would do."""
    from data_prep.dry_run import dry_run

    for line in dry_run(spec, workers).lines():
        echo(line)


def register(app: typer.Typer) -> None:
    """Add the command to its group."""
    add_command(
        app,
        "shards",
        prep_shards,
        example="nextpt prep shards code=data/code.jsonl prose=data/prose.jsonl --output data/shards --sequence-length 256 --vocab-size 4096",
    )
