"""`nextpt compress` and `nextpt decompress`: lossless coding of files with a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.console import build_table, console, echo, progress_bars
from launcher.options import JsonFile, RunOrModelFolder, Step, Weights
from launcher.registration import add_command

if TYPE_CHECKING:
    from nextpt.evaluate.coding.files import FileCoder

Output = Annotated[Path, typer.Option(help="file to write")]
Sequences = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=65535,
        help="sequences that the file is cut into and coded in parallel [default: by its size]",
    ),
]
Dictionary = Annotated[
    Path | None,
    typer.Option(
        help="text that the other compressors read first, such as the model's training data",
    ),
]


def compress(
    file: Annotated[Path, typer.Argument(help="any file")],
    run: RunOrModelFolder,
    output: Output,
    step: Step = None,
    weights: Weights = "weight",
    sequences: Sequences = None,
    dictionary: Dictionary = None,
    json_path: JsonFile = None,
) -> None:
    """Compress a file with the model's predictions.

    The result is decoded and compared before it is written. `decompress` needs the same model,
    library versions and kind of processor.
    """
    from nextpt.evaluate.coding.files import read_file, write_file
    from nextpt.evaluate.compressors import compare_file
    from nextpt.evaluate.texts import write_result

    _check_output(file, output)
    data = read_file(file)
    context = read_file(dictionary) if dictionary else b""
    coder = _open_coder(run, step, weights)
    with progress_bars("file:") as progress:
        coded, statistics = coder.encode(data, sequences, progress)
    write_file(output, coded)
    others = compare_file(data, context)
    result = statistics.as_dict() | {"file": str(file), "run": str(run), "others": others}
    _print_result(result, dictionary)
    if json_path:
        write_result(result, json_path)
    echo(f"written to {output}, after it was decoded and compared")


def decompress(
    file: Annotated[Path, typer.Argument(help="file that `nextpt compress` wrote")],
    run: RunOrModelFolder,
    output: Output,
    step: Step = None,
    weights: Weights = "weight",
) -> None:
    """Decompress a file that `nextpt compress` wrote.

    Refuses another model, another environment and a damaged file, which would decode to other data.
    """
    from nextpt.evaluate.coding.files import read_file, write_file

    _check_output(file, output)
    coded = read_file(file)
    coder = _open_coder(run, step, weights)
    with progress_bars("file:") as progress:
        data = coder.decode(coded, str(file), progress)
    write_file(output, data)
    echo(f"{len(data):,} bytes written to {output}")


def _check_output(file: Path, output: Path) -> None:
    """Refuse an output that cannot be written, before minutes of coding. Raises DataError."""
    from nextpt.base.errors import DataError

    folder = output.absolute().parent
    if not folder.is_dir():
        raise DataError(f"--output {output}: folder {folder} does not exist; create it")
    if output.is_dir():
        raise DataError(f"--output {output} is a folder; give the name of a file")
    if output.exists() and file.exists() and output.samefile(file):
        raise DataError(f"--output {output} is the input file; give another name")


def _open_coder(run: Path, step: int | None, weights: str) -> FileCoder:
    # cuBLAS is deterministic only with a workspace of a fixed size, which it reads when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from nextpt.evaluate.coding.files import FileCoder
    from nextpt.evaluate.loaded_model import open_model
    from nextpt.generate.text import pick_device

    source = open_model(run, step, pick_device(), decoder_only=True, weights=weights)
    return FileCoder(source.decoder, source.tokenizer)


def _print_result(result: dict[str, Any], dictionary: Path | None) -> None:
    size, payload, header = result["bytes"], result["payload"], result["header"]
    if not size:
        echo(f"an empty file: {header} bytes of header")
        return
    echo(f"{size:,} bytes, {result['tokens']:,} tokens -> {payload:,} bytes and {header} of header")
    if result["stored"]:
        echo(
            f"the model's code of {result['stored']} of {result['segments']} segments is longer"
            " than the bytes themselves, stored or deflated, which were taken instead; by the model"
            f" alone {result['code_length']:,.1f} bytes"
        )
    else:
        echo(
            f"code length by the model {result['code_length']:,.1f} bytes; overhead of the coder"
            f" {payload - result['code_length']:+,.1f} bytes"
        )
    echo(
        f"{size / result['seconds']:,.0f} bytes/s encoding,"
        f" {size / result['verify_seconds']:,.0f} bytes/s decoding"
    )
    title = f"without the model itself ({result['model_bytes']:,} bytes)"
    if dictionary:
        title += f"; the others have read {dictionary.name} first"
    rows = [["this model", f"{payload + header:,}", f"{result['bits_per_byte_total']:.3f}"]]
    rows += [
        [name, f"{other['bytes']:,}", f"{other['bits_per_byte']:.3f}"]
        for name, other in result["others"].items()
    ]
    console.print(build_table(title, ["", "bytes", "bits per byte"], rows))


def register(app: typer.Typer) -> None:
    """Add both commands to the application."""
    add_command(
        app,
        "compress",
        compress,
        example="nextpt compress book.txt --run runs/demo --output book.nxpt",
        deprecated={"--rows": "--sequences", "--given": "--dictionary"},
    )
    add_command(
        app,
        "decompress",
        decompress,
        example="nextpt decompress book.nxpt --run runs/demo --output book.txt",
    )
