"""How fits, predictions and budgets are shown."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from launcher.console import console, echo
from nextpt.scaling.checks import BEYOND, describe
from nextpt.scaling.fitting import Fit
from nextpt.scaling.frontier import Frontier
from nextpt.scaling.record import LEVEL
from nextpt.scaling.repeats import RepeatedFit


def say_fit(fit: Fit, values: dict[str, Any]) -> None:
    """Constants with intervals, the exponent of the optimum, warnings, and what single runs decide."""
    echo(f"{values['formula']}   ({values['source']})")
    echo(describe(fit.runs))
    echo(fit.runs.convention)
    if fit.delta is None:
        echo(f"least squares in nats, residuals {values['residual_rms']:.2%} rms of the loss")
    else:
        kind = (
            f"Huber's loss of ln L, delta {fit.delta:g}"
            if fit.delta
            else "least absolute deviations of ln L (delta -> 0)"
        )
        echo(f"{kind}; residuals {values['residual_rms']:.2%} rms of the loss")
    names = list(fit.constants) + [
        name for name in ("N_c", "D_c") if name in values and name not in fit.constants
    ]
    console.print(
        _constants(
            {name: values[name] for name in names},
            values,
            len(next(iter(fit.resamples.values()), ())),
        )
    )
    if "A" in values:
        echo(
            "the same law as L = (N_c / N)^alpha + (D_c / D)^beta + E, N_c = A^(1/alpha) in"
            " parameters, D_c = B^(1/beta) in tokens"
        )
    optimal = values["optimal_exponent"]
    between = (
        f" (95 % {optimal['interval_N'][0]:.3f} to {optimal['interval_N'][1]:.3f})"
        if optimal["interval_N"]
        else ""
    )
    echo(f"compute-optimal: N grows as C^{optimal['N']:.3f}{between}, D as C^{optimal['D']:.3f}")
    if fit.resampled == "residuals":
        echo(f"{len(fit.runs)} runs are too few to resample runs: the intervals resample residuals")
    _say_warnings(values)
    _say_sensitivity(values)


def say_frontier(found: Frontier, values: dict[str, Any]) -> None:
    """The exponent, and the best sizes that it goes through."""
    echo(describe(found.runs))
    echo(found.runs.convention)
    between = (
        ""
        if values["intervals"] is None
        else f" (95 % {values['intervals']['a'][0]:.3f} to {values['intervals']['a'][1]:.3f})"
    )
    echo(
        f"compute-optimal: N = {np.exp(found.log_k):.3g} C^{found.a:.3f}{between}, D as"
        f" C^{1 - found.a:.3f}"
    )
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title_justify="left",
        title=f"best sizes: {len(found.optima)} amounts of compute"
        + (", ten of them shown" if len(found.optima) > 10 else ""),
    )
    for heading in ("C, FLOPs", "N", "D", "D / N", "loss"):
        table.add_column(heading, justify="right")
    for i in np.unique(np.linspace(0, len(found.optima) - 1, 10).astype(int)):
        o = found.optima[i]
        table.add_row(
            f"{o.flops:.3g}",
            f"{o.parameters:.3g}",
            f"{o.tokens:.3g}",
            f"{o.tokens / o.parameters:.1f}",
            f"{o.loss:.4f}",
        )
    console.print(table)
    _say_warnings(values)


def say_repeated(found: RepeatedFit, values: dict[str, Any]) -> None:
    """Seven constants with intervals."""
    echo(f"{values['formula']}   ({values['source']})")
    echo(describe(found.runs))
    echo(found.runs.convention)
    console.print(
        _constants(found.constants, values, len(next(iter(found.resamples.values()), ())))
    )
    echo(
        "R_D: repetitions after which further ones are worth 1/e of new tokens; R_N: the same for"
        " parameters beyond what the tokens need"
    )
    _say_warnings(values)


def say_budget(made: dict[str, Any]) -> None:
    """The optimum of a budget and the price of smaller models."""

    def between(pair: list[float] | None) -> str:
        return f"   {made['level']:.0%} {pair[0]:.3g} to {pair[1]:.3g}" if pair else ""

    echo(f"budget          {made['flops']:.3g} FLOPs")
    echo(f"parameters N    {made['parameters']:.3g}{between(made['parameters_interval'])}")
    echo(
        f"tokens D        {made['tokens']:.3g}{between(made['tokens_interval'])}  "
        f" {made['tokens_per_parameter']:.1f} per parameter"
    )
    if "loss" in made:
        echo(
            "loss           "
            f" {made['loss']['loss']:.4f}{'' if not made['loss']['interval'] else '   {:.0%} {:.4f} to {:.4f}'.format(made['level'], *made['loss']['interval'])}"
        )
    for warning in dict.fromkeys([*made["warnings"], *made.get("loss", {}).get("warnings", [])]):
        echo(f"warning: {warning}")
    if "price" not in made:
        return
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title_justify="left",
        padding=(0, 1, 0, 0),
        title=(
            "over-training: smaller models at the same compute, and the tokens and compute with"
            " which they reach its loss"
        ),
    )
    for heading in ("N / best N", "N", "D", "D / N", "loss", "more loss", "D for it", "C for it"):
        table.add_column(heading, justify="right", no_wrap=True)
    for p in made["price"]:
        reached = p["same_loss_tokens"] is not None
        table.add_row(
            f"{p['share']:g}",
            f"{p['parameters']:.3g}",
            f"{p['tokens']:.3g}",
            f"{p['tokens'] / p['parameters']:.1f}",
            f"{p['loss']:.4f}",
            f"{p['loss'] - made['price'][0]['loss']:.4f}",
            f"{p['same_loss_tokens']:.3g}" if reached else "never",
            f"{p['same_loss_flops'] / made['flops']:.2f} x" if reached else "",
        )
    console.print(table)


def _constants(constants: dict[str, float], values: dict[str, Any], resamples: int) -> Table:
    title = f"{resamples:,} resamples" if resamples else "no intervals: --bootstrap 0"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", title=title)
    table.add_column("")
    table.add_column("value", justify="right")
    if resamples:
        table.add_column(f"{LEVEL:.0%} from", justify="right")
        table.add_column("to", justify="right")
    for name, value in constants.items():
        table.add_row(
            name,
            f"{value:.5g}",
            *(f"{end:.5g}" for end in (values["intervals"][name] if resamples else ())),
        )
    return table


def _say_warnings(values: dict[str, Any]) -> None:
    for warning in values["warnings"]:
        echo(f"warning: {warning}")


def _say_sensitivity(values: dict[str, Any]) -> None:
    found = values["sensitivity"]
    names = list(found[0]["constants"])
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title_justify="left",
        padding=(0, 1, 0, 0),
        title=(
            f"the same fit without some runs; L: compute-optimal loss at {BEYOND:g} times the"
            " largest compute"
        ),
    )
    table.add_column("", overflow="fold")
    for heading in ("runs", *names, "L"):
        table.add_column(heading, justify="right", no_wrap=True)
    for left in found:
        table.add_row(
            left["what"],
            str(left["runs"]),
            *(f"{left['constants'][name]:.4g}" for name in names),
            f"{left['loss']:.4f}",
        )
    console.print(table)
