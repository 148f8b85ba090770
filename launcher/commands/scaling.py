"""`nextpt scaling`: fit scaling laws to runs, predict losses, choose sizes for a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.commands import scaling_fit, scaling_sweep
from launcher.console import echo
from launcher.options import DEVICES, PrintJson
from launcher.registration import add_command, add_group
from nextpt.base.errors import ScalingError

if TYPE_CHECKING:
    from nextpt.scaling.fitting import Fit
    from nextpt.scaling.frontier import Frontier

MAX_VALUE = 1e60  # far above any number of parameters, tokens or FLOPs

FitFile = Annotated[
    Path, typer.Argument(metavar="FIT.json", help="file that `nextpt scaling fit --json` wrote")
]
Level = Annotated[float, typer.Option(min=0.01, max=0.999, help="level of the intervals")]
UniqueTokens = Annotated[
    float | None,
    typer.Option(help="tokens of the corpus without repetition, for a fit of --form repeated"),
]
Flops = Annotated[float | None, typer.Option(help="budget: training compute, FLOPs")]
GpuHours = Annotated[
    float | None, typer.Option(help="budget: hours of one device, instead of --flops")
]
BudgetDevice = Annotated[str, typer.Option(help=f"with --gpu-hours: {DEVICES}")]
BudgetUtilization = Annotated[
    float,
    typer.Option(min=0.001, max=1, help="with --gpu-hours: model FLOPs utilization (MFU)"),
]


def predict_loss(
    fit_file: FitFile,
    params: Annotated[float, typer.Option(help="parameters N of the model")],
    tokens: Annotated[float, typer.Option(help="training tokens D")],
    unique_tokens: UniqueTokens = None,
    level: Level = 0.9,
    as_json: PrintJson = False,
) -> None:
    """Predict the loss of a model that is not trained yet, with a prediction interval."""
    from nextpt.scaling.predict import predict

    _check_positive("params", params)
    _check_positive("tokens", tokens)
    fit = _read_parametric(fit_file, unique_tokens)
    prediction = predict(fit, params, tokens, level, unique_tokens)
    if as_json:
        print(json.dumps(prediction, indent=1))
        return
    interval = prediction["interval"]
    between = (
        f", {level:.0%} between {interval[0]:.4f} and {interval[1]:.4f}"
        if interval
        else "; no interval: the fit has no resamples (--bootstrap 0)"
    )
    echo(
        f"N = {params:.4g}, D = {tokens:.4g} ({tokens / params:.1f} tokens per parameter),"
        f" C = 6 N D = {prediction['flops']:.3g} FLOPs"
    )
    if unique_tokens is not None:
        echo(f"{unique_tokens:.4g} unique tokens: {prediction['epochs']:.3g} epochs")
    echo(f"loss {prediction['loss']:.4f} ({prediction['loss_unit']}){between}")
    for warning in prediction["warnings"]:
        echo(f"warning: {warning}")


def plan_compute(
    fit_file: FitFile,
    flops: Flops = None,
    gpu_hours: GpuHours = None,
    unique_tokens: UniqueTokens = None,
    device: BudgetDevice = "h100",
    utilisation: BudgetUtilization = 0.4,
    level: Level = 0.9,
    as_json: PrintJson = False,
) -> None:
    """Choose the compute-optimal model for a budget, and the cost of over-training smaller ones."""
    from launcher.tables.scaling import print_budget
    from nextpt.scaling.machines import machine
    from nextpt.scaling.predict import plan_budget

    if flops is not None and gpu_hours is None:
        _check_positive("flops", flops)
        budget = flops
    elif gpu_hours is not None and flops is None:
        budget = gpu_hours * 3600 * machine(device).peak * utilisation
        _check_positive("gpu-hours", budget)
    else:
        raise ScalingError("give either --flops or --gpu-hours")
    plan = plan_budget(_read_fit(fit_file, unique_tokens), budget, level, unique_tokens)
    if as_json:
        print(json.dumps(plan, indent=1))
        return
    if gpu_hours is not None:
        echo(
            f"{gpu_hours:,g} hours of {device} at {utilisation:.0%} of its peak: {budget:.3g} FLOPs"
        )
    print_budget(plan)


def _read_fit(path: Path, unique_tokens: float | None) -> Fit | Frontier:
    """Read a fit; one of repeated data is that of a corpus. Raises ScalingError."""
    from nextpt.scaling.predict import on_corpus
    from nextpt.scaling.record import read_fit

    if unique_tokens is not None:
        _check_positive("unique-tokens", unique_tokens)
    return on_corpus(read_fit(path), unique_tokens)


def _read_parametric(path: Path, unique_tokens: float | None) -> Fit:
    """Read a fit that predicts losses. Raises ScalingError for other forms."""
    from nextpt.scaling.fitting import Fit

    fit = _read_fit(path, unique_tokens)
    if not isinstance(fit, Fit):
        raise ScalingError(
            f"{path} is a fit of the form {fit.name}, which gives optimal sizes and no losses;"
            " fit with --form chinchilla"
        )
    return fit


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < MAX_VALUE:
        raise ScalingError(f"--{name} {value:g} must be above 0 and finite")


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = add_group(
        app, "scaling", help="Fit scaling laws to runs, predict, plan; see docs/scaling.md."
    )
    scaling_fit.register(group)
    add_command(
        group,
        "predict",
        predict_loss,
        example="nextpt scaling predict fit.json --params 70e9 --tokens 1.4e12",
    )
    add_command(
        group,
        "plan",
        plan_compute,
        example=(
            "nextpt scaling plan fit.json --flops 1e21    nextpt scaling plan fit.json"
            " --gpu-hours 5000 --device h100"
        ),
    )
    scaling_sweep.register(group)
