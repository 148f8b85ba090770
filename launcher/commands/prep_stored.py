"""`nextpt prep export`, `upload` and `weigh`: what is done with a finished dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import humanize
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
            help="function of a row (a dict of its columns) that gives T + 1 numbers >= 0",
        ),
    ],
    output: Annotated[Path, typer.Option(help="folder of the new dataset")],
) -> None:
    """Write a dataset again with a weight for each token, for objective.token_weights=true.

    See docs/ablation.md.
    """
    from rich.progress import Progress

    from data_prep.format import DatasetManifest
    from data_prep.token_weights import add_token_weights, load_function

    function = load_function(weights)
    rows = sum(
        counts.rows
        for domains in DatasetManifest.load(data).splits.values()
        for counts in domains.values()
    )
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("weighing rows", total=rows)

        def told(row: dict[str, Any]) -> Any:
            bar.advance(task)
            return function(row)

        add_token_weights(data, output, told)
    echo(
        f"{output}: {rows:,} rows with token_weights; train on it with data.path={output}"
        " objective.token_weights=true"
    )


def export(
    data: Dataset,
    output: Annotated[
        Path, typer.Option(metavar="PREFIX", help="files are PREFIX-DOMAIN-SPLIT.bin and .idx")
    ],
    megatron: Annotated[
        bool, typer.Option("--megatron", help="as Megatron-LM's indexed datasets")
    ] = False,
) -> None:
    """Write a dataset in another program's format."""
    from data_prep.export import export_megatron

    if not megatron:
        raise UserError("name the format to export to: --megatron")
    done = export_megatron(data, output, console)
    for part in done:
        echo(f"{part.prefix}.bin/.idx: {part.sequences:,} sequences, {part.tokens:,} tokens")
    train = [f"{part.tokens} {part.prefix}" for part in done if part.split == "train"]
    echo(f"for Megatron: --split 100,0,0 --data-path {' '.join(train)}   (weights are tokens)")


def upload(
    data: Dataset,
    remote: Annotated[
        str,
        typer.Argument(
            metavar="REMOTE", help="s3://, gs://, abfs://, another scheme of fsspec's, or a folder"
        ),
    ],
    threads: Annotated[int, typer.Option(min=1, help="files sent at the same time")] = 8,
) -> None:
    """Copy a finished dataset to an object store, dataset.json last.

    The same command again goes on.

    S3_ENDPOINT_URL names an S3 that is not Amazon's.
    """
    from data_prep.upload import upload as send

    done = send(data, remote, threads=threads, console=console)
    there = (
        f"; {done.present_files} shards were there already"
        f" ({humanize.naturalsize(done.present_bytes, binary=True)})" * bool(done.present_files)
    )
    echo(
        f"{remote}: {done.sent_files} files, {humanize.naturalsize(done.sent_bytes, binary=True)}"
        f" sent{there}"
    )


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
