"""`nextpt prep export`, `upload` and `weigh`: operations on a finished dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.console import console, echo
from launcher.registration import add_command
from nextpt.base.errors import UserError

Dataset = Annotated[Path, typer.Argument(metavar="DATA", help="dataset folder")]


def weigh(
    data: Dataset,
    weights: Annotated[
        str,
        typer.Option(
            metavar="FILE.py:NAME",
            help="function of a sequence (a dict of its columns) that returns T + 1 numbers >= 0",
        ),
    ],
    output: Annotated[Path, typer.Option(help="folder of the new dataset")],
) -> None:
    """Copy a dataset with a weight for each token, for objective.token_weights=true.

    See docs/ablation.md.
    """
    from rich.progress import Progress

    from data_prep.format import DatasetManifest
    from data_prep.token_weights import add_token_weights, load_function

    function = load_function(weights)
    total = sum(
        counts.sequences
        for domains in DatasetManifest.load(data).splits.values()
        for counts in domains.values()
    )
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("weighing sequences", total=total)

        def weigh(sequence: dict[str, Any]) -> Any:
            bar.advance(task)
            return function(sequence)

        add_token_weights(data, output, weigh)
    echo(
        f"{output}: {total:,} sequences with token_weights; train on it with data.path={output}"
        " objective.token_weights=true"
    )


def export(
    data: Dataset,
    output: Annotated[
        Path, typer.Option(metavar="PREFIX", help="files are PREFIX-DOMAIN-SPLIT.bin and .idx")
    ],
    megatron: Annotated[
        bool, typer.Option("--megatron", help="as indexed datasets of Megatron-LM")
    ] = False,
) -> None:
    """Write a dataset in the format of another framework."""
    from data_prep.export import export_megatron

    if not megatron:
        raise UserError("name the format to export to: --megatron")
    parts = export_megatron(data, output, console)
    for part in parts:
        echo(f"{part.prefix}.bin/.idx: {part.sequences:,} sequences, {part.tokens:,} tokens")
    train = [f"{part.tokens} {part.prefix}" for part in parts if part.split == "train"]
    echo(f"for Megatron: --split 100,0,0 --data-path {' '.join(train)}   (weights are tokens)")


def upload(
    data: Dataset,
    remote: Annotated[
        str,
        typer.Argument(
            metavar="REMOTE", help="s3://, gs://, abfs://, another scheme of fsspec, or a folder"
        ),
    ],
    threads: Annotated[int, typer.Option(min=1, help="files uploaded in parallel")] = 8,
) -> None:
    """Copy a finished dataset to an object store, dataset.json last.

    The same command continues after an interruption. S3_ENDPOINT_URL sets the endpoint of an
    S3-compatible store.
    """
    from humanize import naturalsize

    from data_prep.upload import upload as upload_dataset

    totals = upload_dataset(data, remote, threads=threads, console=console)
    text = (
        f"{remote}: {totals.sent_files} files, {naturalsize(totals.sent_bytes, binary=True)} sent"
    )
    if totals.present_files:
        size = naturalsize(totals.present_bytes, binary=True)
        text += f"; {totals.present_files} shards were there already ({size})"
    echo(text)


def register(app: typer.Typer) -> None:
    """Add the commands to the group `nextpt prep`."""
    add_command(
        app,
        "export",
        export,
        example="nextpt prep export --megatron data/shards --output data/megatron/web",
    )
    add_command(app, "upload", upload, example="nextpt prep upload data/shards s3://bucket/web")
    add_command(
        app,
        "weigh",
        weigh,
        example="nextpt prep weigh data/shards --weights weights.py:blanks --output data/weighted",
    )
