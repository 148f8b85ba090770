"""`nextpt scaling fit`: fit a scaling law to runs of a CSV file or to run folders."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.console import echo
from launcher.options import PlotFile
from launcher.registration import add_command
from nextpt.base.errors import ScalingError

if TYPE_CHECKING:
    from nextpt.scaling.observations import Runs

PARAMETRIC_FORMS = ("chinchilla", "kaplan", "over-training", "repeated")
FRONTIER_FORMS = ("isoflop", "envelope")
FORMS = (*PARAMETRIC_FORMS, *FRONTIER_FORMS)

Sources = Annotated[
    list[Path],
    typer.Argument(
        metavar="DATA.csv | RUN...", help="a CSV file with one run per line, or run folders"
    ),
]
ParamsColumn = Annotated[str | None, typer.Option(help="column of the parameters N")]
TokensColumn = Annotated[str | None, typer.Option(help="column of the training tokens D")]
FlopsColumn = Annotated[
    str | None,
    typer.Option(help="column of the training compute C, FLOPs; D is then C / (6 N)"),
]
LossColumn = Annotated[
    str | None, typer.Option(help="column of the loss, nats per token or another unit")
]
UniqueColumn = Annotated[
    str | None, typer.Option(help="column of the unique tokens, for --form repeated")
]
Count = Annotated[
    str,
    typer.Option(
        help=(
            "what N counts in run folders: parameters, non_embedding_parameters or"
            " matmul_parameters"
        )
    ),
]
Form = Annotated[
    str,
    typer.Option(
        help=(
            f"{', '.join(PARAMETRIC_FORMS)}; isoflop and envelope are approaches 2 and 1 of"
            " Hoffmann et al. (Chinchilla)"
        )
    ),
]
DropHighest = Annotated[
    int, typer.Option(min=0, help="number of runs with the highest losses to leave out")
]
Delta = Annotated[
    float | None,
    typer.Option(
        min=0,
        help=(
            "delta of the Huber loss, in units of ln loss; 0 is least absolute deviations"
            " [default: 0.001]"
        ),
    ),
]
Bootstrap = Annotated[
    int, typer.Option(min=0, help="bootstrap resamples for the intervals; 0 for none")
]
Fix = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="hold a constant of --form repeated at a value, R_N=5.31 for example; repeatable",
    ),
]
FitJson = Annotated[
    Path | None,
    typer.Option("--json", help="also write constants, intervals and resamples to this file"),
]


def fit_law(
    sources: Sources,
    params_column: ParamsColumn = None,
    tokens_column: TokensColumn = None,
    flops_column: FlopsColumn = None,
    loss_column: LossColumn = None,
    unique_column: UniqueColumn = None,
    count: Count = "parameters",
    form: Form = "chinchilla",
    drop_highest: DropHighest = 0,
    delta: Delta = None,
    fix: Fix = None,
    bootstrap: Bootstrap = 1000,
    json_path: FitJson = None,
    plot: PlotFile = None,
) -> None:
    """Fit a scaling law, with C = 6 N D and 95 % bootstrap intervals."""
    from nextpt.scaling.observations import drop_highest_losses
    from nextpt.scaling.plots import check_plot

    if form not in FORMS:
        raise ScalingError(f"--form {form}: known are {', '.join(FORMS)}")
    if delta is not None and form in FRONTIER_FORMS:
        raise ScalingError(f"--delta is for the Huber loss; --form {form} does not use it")
    if fix and form != "repeated":
        raise ScalingError(
            f"--fix {fix[0]} is for --form repeated; --form {form} fits all its constants"
        )
    fixed = _parse_fixed(fix or [])
    if plot:
        check_plot(plot, form)
    columns = {
        "parameters": params_column,
        "tokens": tokens_column,
        "flops": flops_column,
        "loss": loss_column,
        "unique_tokens": unique_column,
    }
    runs = read_runs(sources, columns, count, curves=form == "envelope")
    runs = drop_highest_losses(runs, drop_highest)
    _fit_print_write(runs, form, delta, bootstrap, fixed, json_path, plot)


def _parse_fixed(texts: list[str]) -> dict[str, float]:
    """Return name -> value of texts NAME=VALUE. Raises ScalingError."""
    from nextpt.scaling.repeats import check_fixed

    fixed: dict[str, float] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not equals or math.isnan(number):
            raise ScalingError(f"--fix {text}: expected NAME=VALUE, R_D=15.39 for example")
        if name in fixed:
            raise ScalingError(f"--fix {name} is given twice, {fixed[name]:g} and {number:g}")
        fixed[name] = number
    check_fixed(fixed)
    return fixed


def _fit_print_write(
    runs: Runs,
    form: str,
    delta: float | None,
    bootstrap: int,
    fixed: dict[str, float],
    json_path: Path | None,
    plot: Path | None,
) -> None:
    from launcher.tables.scaling import print_fit, print_frontier, print_repeated
    from nextpt.scaling import frontier, record
    from nextpt.scaling.fitting import Fit, fit
    from nextpt.scaling.laws import LAWS
    from nextpt.scaling.plots import plot_fit
    from nextpt.scaling.repeats import fit_repeated

    result: Fit | frontier.Frontier | None = None
    if form in LAWS:
        result = fit(LAWS[form], runs, delta=delta, bootstrap=bootstrap)
        values = record.fit_json(result)
        print_fit(result, values)
    elif form == "repeated":
        repeated = fit_repeated(runs, delta=delta, bootstrap=bootstrap, fixed=fixed)
        values = record.repeated_json(repeated)
        print_repeated(repeated, values)
    else:
        approach = frontier.isoflop if form == "isoflop" else frontier.envelope
        result = approach(runs, bootstrap)
        values = record.frontier_json(result)
        print_frontier(result, values)
    if json_path:
        record.write_json(values, json_path)
        echo(f"written to {json_path}")
    if plot and result:
        plot_fit(result, plot)
        echo(f"plotted in {plot}")


def read_runs(
    sources: list[Path], columns: dict[str, str | None], count: str, *, curves: bool
) -> Runs:
    """Read the runs of one CSV file or of run folders.

    Args:
        sources: One CSV file, or run folders.
        columns: Quantity -> name of its column, None where it was not given.
        count: What N counts in run folders, one of nextpt.scaling.observations.COUNTS.
        curves: Read every validation of a run folder, not only the last.

    Raises:
        ScalingError: The sources or the columns do not fit together, or cannot be read.
    """
    from nextpt.scaling.observations import COUNTS, read_csv, read_run_folders

    if any(source.is_dir() for source in sources):
        if named := [name for name, column in columns.items() if column]:
            raise ScalingError(
                f"{sources[0]} is a run folder, which has no columns; leave out the column of"
                f" {named[0]}"
            )
        if count not in COUNTS:
            raise ScalingError(f"--count {count}: known are {', '.join(COUNTS)}")
        return read_run_folders(sources, count, curves=curves)
    if len(sources) > 1:
        raise ScalingError(f"{len(sources)} files: give one CSV file, or run folders")
    parameters, loss = columns["parameters"], columns["loss"]
    if parameters is None or loss is None:
        raise ScalingError(
            f"{sources[0]}: name its columns with --params-column, --loss-column and"
            " --tokens-column or --flops-column"
        )
    return read_csv(
        sources[0],
        parameters=parameters,
        loss=loss,
        tokens=columns["tokens"],
        flops=columns["flops"],
        unique_tokens=columns["unique_tokens"],
    )


def register(app: typer.Typer) -> None:
    """Add the command to its group."""
    add_command(
        app,
        "fit",
        fit_law,
        example=(
            "nextpt scaling fit runs.csv --params-column N --tokens-column D --loss-column loss"
            " --json fit.json    nextpt scaling fit runs/small runs/middle runs/... --json"
            " fit.json"
        ),
    )
