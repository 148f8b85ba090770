"""`nextpt coordinate-check`: whether activations change alike at all widths and depths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from launcher.console import build_table, console, echo, progress_bars
from launcher.options import JsonFile, Overrides, PlotFile, parse_sizes
from launcher.registration import add_command

if TYPE_CHECKING:
    from rich.table import Table

    from nextpt.config import Config
    from nextpt.data.batch import Batch
    from nextpt.scaling.coordinate_check import Axis, Sweep

MIN_STEPS = 3  # nextpt.scaling.coordinate_check.FIRST_JUDGED_STEP

File = Annotated[str, typer.Argument(help="YAML file of the run, see configs/")]
Widths = Annotated[
    str | None,
    typer.Option(
        help=(
            "widths of the models, such as 64,128,256; the width of a head stays [default: 1, 2,"
            " 4 and 8 groups of heads, unless --depths is given]"
        )
    ),
]
Depths = Annotated[str | None, typer.Option(help="depths of the models, such as 2,4,8")]
Steps = Annotated[int, typer.Option(min=MIN_STEPS, help="optimizer steps of each model")]
Seeds = Annotated[int, typer.Option(min=1, help="initial weights of each model")]
Sequences = Annotated[int, typer.Option(min=1, help="sequences in the batch of all steps")]
RandomTokens = Annotated[
    bool, typer.Option("--random-tokens", help="random tokens instead of the dataset's")
]


def coordinate_check(
    file: File,
    overrides: Overrides = None,
    widths: Widths = None,
    depths: Depths = None,
    steps: Steps = 6,
    seeds: Seeds = 2,
    sequences: Sequences = 4,
    random_tokens: RandomTokens = False,
    json_file: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """Check whether a few steps change activations alike at all widths and depths."""
    from nextpt.base.plots import check_plot_path
    from nextpt.config import load_config
    from nextpt.data.epochs import count_epoch
    from nextpt.scaling.coordinate_check import default_widths, sweep
    from nextpt.scaling.coordinate_plot import plot_sweeps
    from nextpt.scaling.record import write_json

    if plot is not None:
        check_plot_path(plot)
    config = load_config(file, overrides or [])
    if not random_tokens:
        config = count_epoch(config)
    values: dict[Axis, list[int]] = {}
    if widths is not None or depths is None:
        values["width"] = parse_sizes("--widths", widths) if widths else default_widths(config)
    if depths is not None:
        values["depth"] = parse_sizes("--depths", depths)
    batch = _batch(config, sequences, random_tokens)
    sweeps = []
    with progress_bars("measured") as progress:
        for axis, sizes in values.items():
            options = {"steps": steps, "seeds": seeds}
            sweeps.append(sweep(config, axis, sizes, batch=batch, progress=progress, **options))
    for result in sweeps:
        console.print(_table(result))
    for result in sweeps:
        echo(_verdict(result))
    description = _describe(config)
    if json_file is not None:
        content = {
            "description": description,
            "random_tokens": random_tokens,
            "sweeps": [result.to_json() for result in sweeps],
        }
        write_json(content, json_file)
    if plot is not None:
        plot_sweeps(sweeps, description, plot)


def _batch(config: Config, sequences: int, random_tokens: bool) -> Batch:
    import torch

    from nextpt.base.errors import DataError
    from nextpt.scaling.coordinate_check import first_batch, random_batch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if random_tokens:
        return random_batch(config, sequences).to(device)
    try:
        return first_batch(config, sequences).to(device)
    except DataError as error:
        raise DataError(f"{error}; without a dataset use --random-tokens") from None


def _describe(config: Config) -> str:
    """The parametrization and the optimizer, for titles."""
    model, optimizer = config.model, config.optimizer
    base = "" if model.parametrization == "standard" else f", base width {model.base_width}"
    if model.parametrization == "completep":
        base += f", base depth {model.base_depth}"
    kind = optimizer.kind if optimizer.muon is None else f"muon ({optimizer.muon.scale})"
    return f"{model.parametrization}{base}; {kind}"


def _table(result: Sweep) -> Table:
    """Mean changes after the last step by width or depth, and slopes of some steps."""
    from nextpt.scaling.coordinate_check import FIRST_JUDGED_STEP

    last = result.steps
    shown = sorted({1, FIRST_JUDGED_STEP, last})
    headings = [
        "activations",
        *(f"{result.axis} {value}" for value in result.values),
        *(f"slope, step {step}" for step in shown),
    ]
    rows = [
        [
            place,
            *(f"{result.mean('changes', place, last, value):.3g}" for value in result.values),
            *(f"{result.slope(place, step):+.2f}" for step in shown),
        ]
        for place in result.places
    ]
    rows += [
        [
            f"update of {component}",
            *(f"{result.mean('updates', component, -1, value):.3g}" for value in result.values),
        ]
        for component in result.measurements[0].updates
    ]
    return build_table(f"mean |x_t - x_0| of activations after {last} steps", headings, rows)


def _verdict(result: Sweep) -> str:
    """One line: what grows or shrinks along the axis."""
    from nextpt.scaling.coordinate_check import FIRST_JUDGED_STEP, JUDGED, LARGEST_SLOPE

    slopes = ", ".join(f"{place} {result.judged_slope(place):+.2f}" for place in JUDGED)
    verdict = f"changes of activations do not depend on the {result.axis}"
    if result.shrinking:
        verdict = f"the change of {', '.join(result.shrinking)} shrinks with the {result.axis}"
    if result.growing:
        verdict = f"the change of {', '.join(result.growing)} grows with the {result.axis}"
    return (
        f"{verdict}: mean slopes from step {FIRST_JUDGED_STEP} on are {slopes}; the bound is"
        f" {LARGEST_SLOPE:g}"
    )


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    add_command(
        app,
        "coordinate-check",
        coordinate_check,
        example=(
            "nextpt coordinate-check configs/demo.yaml model.parametrization=mup"
            " model.base_width=64 --widths 32,64,128,256 --plot check.png"
        ),
    )
