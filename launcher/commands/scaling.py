"""`nextpt scaling`: fit scaling laws to runs, predict losses, divide a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.commands import scaling_sweep
from launcher.console import echo
from launcher.registration import add_command, add_group
from nextpt.base.errors import ScalingError

if TYPE_CHECKING:
    from nextpt.scaling.fitting import Fit
    from nextpt.scaling.observations import Runs


FORMS = ("chinchilla", "kaplan", "over-training", "repeated", "isoflop", "envelope")
FitFile = Annotated[
    Path, typer.Argument(metavar="FIT.json", help="what `nextpt scaling fit --json` wrote")
]
Level = Annotated[float, typer.Option(min=0.01, max=0.999, help="of the intervals")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON and nothing else")]


def fit_command(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="DATA.csv | RUN...", help="a CSV file with a line per run, or run folders"
        ),
    ],
    params_column: Annotated[str | None, typer.Option(help="column of parameters N")] = None,
    tokens_column: Annotated[str | None, typer.Option(help="column of training tokens D")] = None,
    flops_column: Annotated[
        str | None, typer.Option(help="column of training compute C, FLOPs; then D = C / (6 N)")
    ] = None,
    loss_column: Annotated[
        str | None, typer.Option(help="column of the loss, nats per token")
    ] = None,
    unique_column: Annotated[
        str | None, typer.Option(help="column of different tokens, for --form repeated")
    ] = None,
    count: Annotated[
        str,
        typer.Option(
            help="of run folders: parameters, non_embedding_parameters or matmul_parameters is N"
        ),
    ] = "parameters",
    form: Annotated[
        str,
        typer.Option(
            help=(
                f"{', '.join(FORMS[:-2])}; isoflop and envelope are Chinchilla's approaches 2 and 1"
            )
        ),
    ] = "chinchilla",
    drop_highest: Annotated[
        int, typer.Option(min=0, help="leave out the runs of so many highest losses")
    ] = 0,
    delta: Annotated[
        float | None,
        typer.Option(
            min=0,
            help=(
                "of Huber's loss, in units of ln loss; 0: least absolute deviations; 0.001 unless"
                " given"
            ),
        ),
    ] = None,
    bootstrap: Annotated[int, typer.Option(min=0, help="resamples for intervals; 0: none")] = 1000,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", help="also write constants, intervals and resamples to this file"),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="also draw a picture: .svg, .png or .pdf")
    ] = None,
) -> None:
    """Fit a scaling law. C = 6 N D. Intervals are of 95 %, by the bootstrap."""
    from launcher.tables.scaling import say_fit, say_frontier, say_repeated
    from nextpt.scaling import frontier, record
    from nextpt.scaling.fitting import fit
    from nextpt.scaling.laws import LAWS
    from nextpt.scaling.observations import drop_highest as drop
    from nextpt.scaling.plots import check_plot_format, plot_fit
    from nextpt.scaling.repeats import fit_repeated

    if form not in FORMS:
        raise ScalingError(f"--form {form}: known are {', '.join(FORMS)}")
    if delta is not None and form in FORMS[-2:]:
        raise ScalingError(f"--delta belongs to Huber's loss; --form {form} has none")
    if plot:
        check_plot_format(plot, form)
    columns = {
        "parameters": params_column,
        "tokens": tokens_column,
        "flops": flops_column,
        "loss": loss_column,
        "unique_tokens": unique_column,
    }
    runs = drop(_read(sources, columns, count, curves=form == "envelope"), drop_highest)
    if form in LAWS:
        found = fit(LAWS[form], runs, delta=delta, bootstrap=bootstrap)
        values = record.fit_json(found)
        say_fit(found, values)
    elif form == "repeated":
        found = fit_repeated(runs, delta=delta, bootstrap=bootstrap)
        values = record.repeated_json(found)
        say_repeated(found, values)
    else:
        found = (frontier.isoflop if form == "isoflop" else frontier.envelope)(runs, bootstrap)
        values = record.frontier_json(found)
        say_frontier(found, values)
    if json_path:
        record.write_json(values, json_path)
        echo(f"written to {json_path}")
    if plot:
        plot_fit(found, plot)
        echo(f"drawn in {plot}")


def predict(
    fit_file: FitFile,
    params: Annotated[
        float, typer.Option(help="parameters N of the model that is not trained yet")
    ],
    tokens: Annotated[float, typer.Option(help="training tokens D")],
    level: Level = 0.9,
    as_json: AsJson = False,
) -> None:
    """The loss of a model that is not trained yet, with the interval in which a single run may end."""
    from nextpt.scaling.predict import predict as make

    _positive(params=params, tokens=tokens)
    made = make(_parametric(fit_file), params, tokens, level)
    if as_json:
        print(json.dumps(made, indent=1))
        return
    between = (
        f", {level:.0%} between {made['interval'][0]:.4f} and {made['interval'][1]:.4f}"
        if made["interval"]
        else "; no interval: the fit has no resamples (--bootstrap 0)"
    )
    echo(
        f"N = {params:.4g}, D = {tokens:.4g} ({tokens / params:.1f} tokens per parameter), C = 6 N"
        f" D = {made['flops']:.3g} FLOPs"
    )
    echo(f"loss {made['loss']:.4f} nats per token{between}")
    for warning in made["warnings"]:
        echo(f"warning: {warning}")


def plan(
    fit_file: FitFile,
    flops: Annotated[float | None, typer.Option(help="budget, FLOPs of training")] = None,
    gpu_hours: Annotated[
        float | None, typer.Option(help="budget, hours of one device; or give --flops")
    ] = None,
    device: Annotated[
        str, typer.Option(help="with --gpu-hours: a10, l40s, a100-40, a100, h100, h200 or b200")
    ] = "h100",
    utilisation: Annotated[
        float,
        typer.Option(
            min=0.001,
            max=1,
            help="with --gpu-hours: share of the peak that the model's FLOPs reach",
        ),
    ] = 0.4,
    level: Level = 0.9,
    as_json: AsJson = False,
) -> None:
    """The compute-optimal model for a budget, with intervals, and what smaller models that train longer cost."""
    from launcher.tables.scaling import say_budget
    from nextpt.scaling.machines import machine
    from nextpt.scaling.predict import plan_budget
    from nextpt.scaling.record import read_fit

    if (flops is None) == (gpu_hours is None):
        raise ScalingError("give either --flops or --gpu-hours")
    budget = flops if flops is not None else gpu_hours * 3600 * machine(device).peak * utilisation
    _positive(**{"flops" if flops is not None else "gpu-hours": budget})
    made = plan_budget(read_fit(fit_file), budget, level)
    if as_json:
        print(json.dumps(made, indent=1))
        return
    if gpu_hours is not None:
        echo(
            f"{gpu_hours:,g} hours of {device} at {utilisation:.0%} of its peak: {budget:.3g} FLOPs"
        )
    say_budget(made)


def _read(sources: list[Path], columns: dict[str, str | None], count: str, *, curves: bool) -> Runs:
    from nextpt.scaling.observations import COUNTS, read_csv, read_run_folders

    if any(source.is_dir() for source in sources):
        if given := [name for name, column in columns.items() if column]:
            raise ScalingError(
                f"{sources[0]} is a run folder, which has no columns; leave out the column of"
                f" {given[0]}"
            )
        if count not in COUNTS:
            raise ScalingError(f"--count {count}: known are {', '.join(COUNTS)}")
        return read_run_folders(sources, count, curves=curves)
    if len(sources) > 1:
        raise ScalingError(f"{len(sources)} files: give one CSV file, or run folders")
    if columns["parameters"] is None or columns["loss"] is None:
        raise ScalingError(
            f"{sources[0]}: name its columns with --params-column, --loss-column and"
            " --tokens-column or --flops-column"
        )
    return read_csv(sources[0], **columns)


def _parametric(path: Path) -> Fit:
    from nextpt.scaling.fitting import Fit
    from nextpt.scaling.record import read_fit

    found = read_fit(path)
    if not isinstance(found, Fit):
        raise ScalingError(
            f"{path} is a fit of the form {found.name}, which gives optimal sizes and no losses;"
            " fit with --form chinchilla"
        )
    return found


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < 1e60:
            raise ScalingError(f"--{name} {value:g} must be above 0 and finite")


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = add_group(
        app, "scaling", help="Fit scaling laws to runs, predict, plan; see docs/scaling.md."
    )
    add_command(
        group,
        "fit",
        fit_command,
        example="nextpt scaling fit runs.csv --params-column N --tokens-column D --loss-column loss --json fit.json    nextpt scaling fit runs/small runs/middle runs/... --json fit.json",
    )
    add_command(
        group,
        "predict",
        predict,
        example="nextpt scaling predict fit.json --params 70e9 --tokens 1.4e12",
    )
    add_command(
        group,
        "plan",
        plan,
        example="nextpt scaling plan fit.json --flops 1e21    nextpt scaling plan fit.json --gpu-hours 5000 --device h100",
    )
    scaling_sweep.register(group)
