"""`nextpt prep export` and `nextpt prep upload`: what is done with a finished dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import humanize
import typer

from launcher.console import friendly, out, say
from nextpt.errors import UserError

Dataset = Annotated[Path, typer.Argument(metavar="DATA", help="dataset folder")]


def register(prep: typer.Typer) -> None:
    """Add the commands to the group `nextpt prep`."""
    prep.command("export", epilog="example: nextpt prep export --megatron data/shards --output data/megatron/web")(friendly(export))
    prep.command("upload", epilog="example: nextpt prep upload data/shards s3://bucket/web")(friendly(upload))


def export(
    data: Dataset,
    output: Annotated[Path, typer.Option(metavar="PREFIX", help="files are PREFIX-DOMAIN-SPLIT.bin and .idx")],
    megatron: Annotated[bool, typer.Option("--megatron", help="as Megatron-LM's indexed datasets")] = False,
) -> None:
    """Write a dataset in another program's format."""
    from data_prep.export import export_megatron

    if not megatron:
        raise UserError("name the format to export to: --megatron")
    done = export_megatron(data, output, out)
    for part in done:
        say(f"{part.prefix}.bin/.idx: {part.sequences:,} sequences, {part.tokens:,} tokens")
    train = [f"{part.tokens} {part.prefix}" for part in done if part.split == "train"]
    say(f"for Megatron: --split 100,0,0 --data-path {' '.join(train)}   (weights are tokens)")


def upload(
    data: Dataset,
    remote: Annotated[str, typer.Argument(metavar="REMOTE", help="s3://, gs://, abfs://, another scheme of fsspec's, or a folder")],
    threads: Annotated[int, typer.Option(min=1, help="files sent at the same time")] = 8,
) -> None:
    """Copy a finished dataset to an object store, dataset.json last. The same command again goes on.

    S3_ENDPOINT_URL names an S3 that is not Amazon's.
    """
    from data_prep.upload import upload as send

    done = send(data, remote, threads=threads, console=out)
    there = f"; {done.present_files} shards were there already ({humanize.naturalsize(done.present_bytes, binary=True)})" * bool(done.present_files)
    say(f"{remote}: {done.sent_files} files, {humanize.naturalsize(done.sent_bytes, binary=True)} sent{there}")
