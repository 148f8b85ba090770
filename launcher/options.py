"""Command-line options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nextpt.base.errors import ConfigError

ConfigFile = Annotated[str, typer.Option("--config", help="YAML file of the run, see configs/")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value]...", help="config keys that override those of the file"),
]
RunFolder = Annotated[Path, typer.Option("--run", help="run folder, such as runs/demo")]
RunOrModelFolder = Annotated[
    Path, typer.Option("--run", help="run folder, such as runs/demo, or a Hugging Face folder")
]
Step = Annotated[
    int | None, typer.Option(help="step of the checkpoint [default: that of the newest]")
]
Weights = Annotated[
    str,
    typer.Option(help="weight, or an average of them that train.ema kept, such as ema-0.999"),
]
Ranks = Annotated[
    int | None,
    typer.Option(min=1, help="processes (ranks) [default: one per GPU, 1 without GPUs]"),
]
SbatchOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--sbatch", help="further sbatch option, such as --partition=gpu; may be repeated"
    ),
]
StartToken = Annotated[
    str | None, typer.Option(help="special token before each document [default: the tokenizer's]")
]
EndToken = Annotated[
    str | None, typer.Option(help="special token after each document [default: the tokenizer's]")
]
TextField = Annotated[
    str, typer.Option(help="key or column of the text in .jsonl and .parquet files")
]
Seed = Annotated[int, typer.Option(min=0, help="seed of the random numbers")]
PrintJson = Annotated[
    bool, typer.Option("--json", help="print JSON to standard output and nothing else")
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="also write the result to this file")]
PlotFile = Annotated[
    Path | None, typer.Option("--plot", help="also write a plot: a .png, .svg or .pdf file")
]
DEVICES = "a10, l40s, a100-40, a100, h100, h200 or b200"  # nextpt.scaling.machines
DeviceName = Annotated[str, typer.Option("--device", help=DEVICES)]
Utilization = Annotated[
    float,
    typer.Option(
        "--utilisation", min=0.001, max=1, help="model FLOPs utilization (MFU), from 0 to 1"
    ),
]


def parse_sizes(option: str, text: str) -> list[int]:
    """Parse the value of an option that is a list of numbers, such as 16,32,64.

    Returns:
        The numbers, each once, in rising order.

    Raises:
        ConfigError: It is not a list of whole numbers above 0.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(
            f"{option} {text}: expected whole numbers above 0, separated by commas, such as"
            " 16,32,64"
        )
    return sorted({int(part) for part in parts})
