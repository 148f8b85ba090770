"""`nextpt prep shards`: corpora to a dataset folder, locally, in a Slurm job array, or on Ray."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from launcher.console import console, echo
from launcher.options import EndToken, StartToken
from launcher.registration import add_command
from nextpt.base.errors import UserError

if TYPE_CHECKING:
    from data_prep.spec import PrepSpec
    from data_prep.workers import Workers

INPUT, OUTPUT, WORKERS = "Input", "Output", "Workers"
ENCODERS = ("auto", "tiktoken", "tokenizers")

Domains = Annotated[
    list[str],
    typer.Argument(
        metavar="DOMAIN=PATH...",
        help=(
            "files, folders, globs or URIs (s3://bucket/web/) of .jsonl, .txt (also .gz, .zst) and"
            " .parquet"
        ),
    ),
]
Output = Annotated[Path, typer.Option(help="dataset folder to write")]
SequenceLength = Annotated[
    int, typer.Option(help="input tokens of a packed sequence", rich_help_panel=OUTPUT)
]
VocabSize = Annotated[
    int | None, typer.Option(help="train a byte-level BPE tokenizer of this size")
]
TokenizerName = Annotated[
    str | None,
    typer.Option(
        help=(
            "or use this tokenizer: tokenizer.json, a file that `nextpt tokenizer convert` reads,"
            " or the name of a tiktoken encoding"
        )
    ),
]
Characters = Annotated[bool, typer.Option("--characters", help="or make every character a token")]
Encoder = Annotated[
    str,
    typer.Option(
        help=(
            "library that encodes: tiktoken, tokenizers, or auto: tiktoken where both are verified"
            " to be equal"
        )
    ),
]
TextField = Annotated[
    str,
    typer.Option(
        help="key or column of the text; dots for nested keys: data.text", rich_help_panel=INPUT
    ),
]
IdField = Annotated[
    str, typer.Option(help="key or column of the id; '' for none", rich_help_panel=INPUT)
]
DomainField = Annotated[
    str | None,
    typer.Option(help="key or column of the domain, in the place of DOMAIN", rich_help_panel=INPUT),
]
MinBytes = Annotated[int, typer.Option(help="skip shorter documents", rich_help_panel=INPUT)]
MaxBytes = Annotated[
    int | None,
    typer.Option(help="skip longer documents [default: no limit]", rich_help_panel=INPUT),
]
Duplicates = Annotated[
    str,
    typer.Option(
        help="documents with the text of an earlier one: keep or drop", rich_help_panel=INPUT
    ),
]
MaxBadFraction = Annotated[
    float,
    typer.Option(
        help="fraction of bad records above which no dataset is written", rich_help_panel=INPUT
    ),
]
ValidationFraction = Annotated[
    float, typer.Option(help="fraction of the validation split", rich_help_panel=OUTPUT)
]
Split = Annotated[
    str,
    typer.Option(
        help="hash: that fraction of the documents; tail: the end of each domain",
        rich_help_panel=OUTPUT,
    ),
]
Packing = Annotated[
    str,
    typer.Option(
        help="best_fit, concat (and chunk), or single (one document per sequence)",
        rich_help_panel=OUTPUT,
    ),
]
Compression = Annotated[
    str | None,
    typer.Option(help="compression of shards: zstd or zstd:LEVEL", rich_help_panel=OUTPUT),
]
OrderSeed = Annotated[
    int, typer.Option(help="seed of the order of sequences", rich_help_panel=OUTPUT)
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="replace a dataset, or unfinished work, with other settings"),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="print what would be done and the estimated time")
]
WorkerCount = Annotated[
    int | None,
    typer.Option(min=1, help="processes [default: one per core]", rich_help_panel=WORKERS),
]
Task = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="this is task I of N that divide the work (0/8), as in a job array",
        rich_help_panel=WORKERS,
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="work on a Ray cluster: its address, auto, or local",
        rich_help_panel=WORKERS,
    ),
]


def prep_shards(
    domains: Domains,
    output: Output,
    sequence_length: SequenceLength,
    vocab_size: VocabSize = None,
    tokenizer: TokenizerName = None,
    characters: Characters = False,
    encoder: Encoder = "auto",
    start_token: StartToken = None,
    end_token: EndToken = None,
    text_field: TextField = "text",
    id_field: IdField = "id",
    domain_field: DomainField = None,
    min_bytes: MinBytes = 1,
    max_bytes: MaxBytes = None,
    duplicates: Duplicates = "keep",
    max_bad_fraction: MaxBadFraction = 1e-4,
    validation_fraction: ValidationFraction = 0.05,
    split: Split = "hash",
    packing: Packing = "best_fit",
    compression: Compression = None,
    seed: OrderSeed = 0,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    workers: WorkerCount = None,
    task: Task = None,
    ray: Ray = None,
) -> None:
    """Split, tokenize, pack and write MDS shards.

    The same command continues where an earlier one was interrupted. OUTPUT/report.html describes
    the dataset.
    """
    from data_prep.spec import PrepSpec

    spec = PrepSpec(
        domains=parse_domains(domains),
        output=output,
        sequence_length=sequence_length,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        characters=characters,
        encoder=_check_encoder(encoder),
        start_token=start_token,
        end_token=end_token,
        validation_fraction=validation_fraction,
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
        print_dry_run(spec, workers)
    else:
        write_shards(spec, overwrite, workers, task, ray)


def write_shards(
    spec: PrepSpec, overwrite: bool, workers: int | None, task: str | None, ray: str | None
) -> None:
    """Write the dataset and print its summary. Raises UserError."""
    from data_prep.prepare import prepare, quarantine_summary, summary_table

    chosen = choose_workers(workers, task, ray)
    manifest = prepare(
        spec, overwrite=overwrite, console=console, workers=chosen, alone=task is None
    )
    console.print(summary_table(manifest))
    echo(quarantine_summary(spec.output))
    echo(f"report: {spec.output}/report.html")


def parse_domains(arguments: list[str]) -> dict[str, str | Path]:
    """Parse DOMAIN=PATH arguments. Raises UserError."""
    paths: dict[str, str | Path] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or not path or name in paths:
            raise UserError(f"{argument!r}: expected DOMAIN=PATH, each domain once")
        paths[name] = path
    return paths


def _check_encoder(encoder: str) -> Literal["auto", "tiktoken", "tokenizers"]:
    if encoder not in ENCODERS:
        raise UserError(
            f"--encoder {encoder}: expected {', '.join(ENCODERS[:-1])} or {ENCODERS[-1]}"
        )
    return cast('Literal["auto", "tiktoken", "tokenizers"]', encoder)


def choose_workers(workers: int | None, task: str | None, ray: str | None) -> Workers | None:
    """Choose the workers from the options; None lets `prepare` decide by the size of the work.

    Raises:
        UserError: --ray and --task are both given, or --task is not I/N.
    """
    from data_prep.workers import LocalWorkers, RayWorkers

    if ray is not None and task is not None:
        raise UserError("--ray and --task exclude each other")
    if ray is not None:
        return RayWorkers(None if ray == "local" else ray, workers)
    if task is None:
        return LocalWorkers(workers) if workers else None
    match = re.fullmatch(r"(\d+)/(\d+)", task)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(f"--task {task}: expected I/N with I from 0 to N - 1")
    return LocalWorkers(workers or len(os.sched_getaffinity(0)), int(match[1]), int(match[2]))


def print_dry_run(spec: PrepSpec, workers: int | None) -> None:
    """Print what a preparation would do."""
    from data_prep.dry_run import dry_run

    for line in dry_run(spec, workers).lines():
        echo(line)


def register(app: typer.Typer) -> None:
    """Add the command to its group."""
    add_command(
        app,
        "shards",
        prep_shards,
        example=(
            "nextpt prep shards code=data/code.jsonl prose=data/prose.jsonl --output data/shards"
            " --sequence-length 256 --vocab-size 4096"
        ),
        deprecated={"--heldout": "--validation-fraction"},
    )
