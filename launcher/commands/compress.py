"""`nextpt compress` and `nextpt decompress`: files coded by a model's predictions, lossless."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.console import build_table, console, echo, progress_bars
from launcher.registration import add_command

RunFolder = Annotated[
    Path, typer.Option("--run", help="run folder, such as runs/demo, or a Hugging Face folder")
]
Step = Annotated[int | None, typer.Option(help="step of the checkpoint; the newest unless given")]
Output = Annotated[Path, typer.Option(help="file to write")]


def compress(
    file: Annotated[Path, typer.Argument(help="any file")],
    run: RunFolder,
    output: Output,
    step: Step = None,
    rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            help=(
                "parts of the file coded at once, each from no context; chosen by its size unless"
                " given"
            ),
        ),
    ] = None,
    given: Annotated[
        Path | None,
        typer.Option(
            help=(
                "a text that the other compressors read first, such as what the model was"
                " trained on"
            )
        ),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="also write the figures to this file")
    ] = None,
) -> None:
    """Code a file by the model's predictions.

    It is decoded again before anything is written or said; `decompress` needs the same model,
    library versions and kind of processor.
    """
    from nextpt.evaluate.coding.files import read_file, write_file
    from nextpt.evaluate.compressors import compare_file
    from nextpt.evaluate.heldout import write_result

    _check_output(file, output)
    data = read_file(file)
    before = read_file(given) if given else b""
    coder = _coder(run, step)
    with progress_bars("file:") as progress:
        coded, found = coder.encode(data, rows, progress)
    write_file(output, coded)
    others = compare_file(data, before)
    result = found.as_dict() | {"file": str(file), "run": str(run), "others": others}
    _show(result, given)
    if json_path:
        write_result(result, json_path)
    echo(f"written to {output}, after it was decoded again and compared")


def decompress(
    file: Annotated[Path, typer.Argument(help="what `nextpt compress` wrote")],
    run: RunFolder,
    output: Output,
    step: Step = None,
) -> None:
    """Decode a file, or refuse: another model, another environment or a damaged file would give something else."""
    from nextpt.evaluate.coding.files import read_file, write_file

    _check_output(file, output)
    coded = read_file(file)
    coder = _coder(run, step)
    with progress_bars("file:") as progress:
        data = coder.decode(coded, str(file), progress)
    write_file(output, data)
    echo(f"{len(data):,} bytes written to {output}")


def _check_output(file: Path, output: Path) -> None:
    """What would only be found after minutes of coding."""
    from nextpt.base.errors import DataError

    if not output.absolute().parent.is_dir():
        raise DataError(f"--output {output}: there is no folder {output.absolute().parent}")
    if output.is_dir() or (output.exists() and file.exists() and output.samefile(file)):
        raise DataError(
            f"--output {output} is {'a folder' if output.is_dir() else 'the file itself'}; give"
            " another name"
        )


def _coder(run: Path, step: int | None) -> Any:
    # cuBLAS repeats itself only with a workspace of a fixed size, which it reads when it begins.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from nextpt.evaluate.coding.files import FileCoder
    from nextpt.evaluate.source import open_source
    from nextpt.generate.text import pick_device

    source = open_source(run, step, pick_device(), decoder_only=True)
    return FileCoder(source.config, source.model, source.tokenizer)


def _show(result: dict[str, Any], given: Path | None) -> None:
    size, payload, header = result["bytes"], result["payload"], result["header"]
    if not size:
        echo(f"an empty file: {header} bytes of header")
        return
    echo(f"{size:,} bytes, {result['tokens']:,} tokens -> {payload:,} bytes and {header} of header")
    echo(
        f"the model's code length is {result['code_length']:,.1f} bytes; the coder's own cost"
        f" {payload - result['code_length']:+,.1f} bytes"
    )
    echo(
        f"{size / result['seconds']:,.0f} bytes/s coding, {size / result['verify_seconds']:,.0f}"
        " bytes/s decoding"
    )
    title = f"the model itself ({result['model_bytes']:,} bytes) is not counted" + (
        f"; the others have read {given.name} first" if given else ""
    )
    rows = [["this model", f"{payload + header:,}", f"{result['bits_per_byte_total']:.3f}"]]
    rows += [
        [name, f"{found['bytes']:,}", f"{found['bits_per_byte']:.3f}"]
        for name, found in result["others"].items()
    ]
    console.print(build_table(title, ["", "bytes", "bits per byte"], rows))


def register(app: typer.Typer) -> None:
    """Add both commands to the application."""
    add_command(
        app,
        "compress",
        compress,
        example="nextpt compress book.txt --run runs/demo --output book.nxpt",
    )
    add_command(
        app,
        "decompress",
        decompress,
        example="nextpt decompress book.nxpt --run runs/demo --output book.txt",
    )
