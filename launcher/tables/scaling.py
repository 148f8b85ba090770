"""Output of `nextpt scaling`: fits, frontiers and budgets as text and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from launcher.console import build_table, console, echo, format_interval
from nextpt.scaling.checks import BEYOND, describe
from nextpt.scaling.fitting import Fit
from nextpt.scaling.frontier import Frontier
from nextpt.scaling.record import LEVEL
from nextpt.scaling.repeats import RepeatedFit

SHOWN_OPTIMA = 10


def print_fit(fit: Fit, values: dict[str, Any]) -> None:
    """Print constants with intervals, the optimum's exponent, warnings and the sensitivity.

    Args:
        fit: The fit.
        values: Its JSON form, see nextpt.scaling.record.fit_json.
    """
    echo(f"{values['formula']}   ({values['source']})")
    echo(describe(fit.runs))
    echo(fit.runs.convention)
    echo(f"{_objective_name(fit.delta)}; residuals {values['residual_rms']:.2%} rms of the loss")
    names = list(fit.constants)
    names += [name for name in ("N_c", "D_c") if name in values and name not in names]
    constants = {name: values[name] for name in names}
    console.print(_constants_table(constants, values, _count_resamples(fit.resamples)))
    if "A" in values:
        echo(
            "the same law as L = (N_c / N)^alpha + (D_c / D)^beta + E, N_c = A^(1/alpha) in"
            " parameters, D_c = B^(1/beta) in tokens"
        )
    optimal = values["optimal_exponent"]
    between = _confidence(optimal["interval_N"])
    echo(f"compute-optimal: N grows as C^{optimal['N']:.3f}{between}, D as C^{optimal['D']:.3f}")
    if fit.resampled == "residuals":
        echo(
            f"{len(fit.runs)} runs are too few to resample runs: the intervals are from resampled"
            " residuals"
        )
    _print_warnings(values["warnings"])
    console.print(_sensitivity_table(values["sensitivity"]))


def print_frontier(frontier: Frontier, values: dict[str, Any]) -> None:
    """Print the exponent of a frontier and the optima that it was fitted to."""
    echo(describe(frontier.runs))
    echo(frontier.runs.convention)
    between = _confidence(values["intervals"]["a"] if values["intervals"] else None)
    echo(
        f"compute-optimal: N = {np.exp(frontier.log_k):.3g} C^{frontier.a:.3f}{between}, D as"
        f" C^{1 - frontier.a:.3f}"
    )
    optima = frontier.optima
    shown = ", ten of them shown" if len(optima) > SHOWN_OPTIMA else ""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title_justify="left",
        title=f"optimal sizes at {len(optima)} amounts of compute{shown}",
    )
    for heading in ("C, FLOPs", "N", "D", "D / N", "loss"):
        table.add_column(heading, justify="right")
    for index in np.unique(np.linspace(0, len(optima) - 1, SHOWN_OPTIMA).astype(int)):
        optimum = optima[index]
        table.add_row(
            f"{optimum.flops:.3g}",
            f"{optimum.parameters:.3g}",
            f"{optimum.tokens:.3g}",
            f"{optimum.tokens / optimum.parameters:.1f}",
            f"{optimum.loss:.4f}",
        )
    console.print(table)
    _print_warnings(values["warnings"])


def print_repeated(fit: RepeatedFit, values: dict[str, Any]) -> None:
    """Print the seven constants of the law of repeated data, with intervals."""
    echo(f"{values['formula']}   ({values['source']})")
    echo(describe(fit.runs))
    echo(fit.runs.convention)
    console.print(_constants_table(fit.constants, values, _count_resamples(fit.resamples)))
    echo(
        "R_D: repetitions after which a further one is worth 1/e of new tokens; R_N: the same for"
        " parameters beyond the compute-optimal number for these tokens"
    )
    if fit.fixed:
        echo(f"held, not fitted: {', '.join(f'{n} = {v:g}' for n, v in fit.fixed.items())}")
    _print_warnings(values["warnings"])


def print_budget(plan: dict[str, Any]) -> None:
    """Print the optimum of a budget and the cost of smaller models.

    Args:
        plan: See nextpt.scaling.predict.plan_budget.
    """

    def between(interval: Sequence[float] | None) -> str:
        return f"   {plan['level']:.0%} {format_interval(interval, '.3g')}" if interval else ""

    echo(f"budget          {plan['flops']:.3g} FLOPs")
    echo(f"parameters N    {plan['parameters']:.3g}{between(plan['parameters_interval'])}")
    echo(
        f"tokens D        {plan['tokens']:.3g}{between(plan['tokens_interval'])}"
        f"   {plan['tokens_per_parameter']:.1f} per parameter"
    )
    if "epochs" in plan:
        echo(f"epochs          {plan['epochs']:.3g}   of {plan['unique_tokens']:.3g} unique tokens")
    loss = plan.get("loss")
    if loss:
        interval = format_interval(loss["interval"], ".4f")
        level = f"   {plan['level']:.0%} {interval}" if interval else ""
        echo(f"loss            {loss['loss']:.4f}{level}")
    warnings = [*plan["warnings"], *(loss["warnings"] if loss else [])]
    _print_warnings(list(dict.fromkeys(warnings)))
    if "price" in plan:
        console.print(_price_table(plan))


def _price_table(plan: dict[str, Any]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title_justify="left",
        padding=(0, 1, 0, 0),
        title=(
            "over-training: smaller models at the same compute, and the tokens and compute with"
            " which they reach the optimal model's loss"
        ),
    )
    for heading in ("N / best N", "N", "D", "D / N", "loss", "more loss", "D for it", "C for it"):
        table.add_column(heading, justify="right", no_wrap=True)
    for priced in plan["price"]:
        reaches = priced["same_loss_tokens"] is not None
        table.add_row(
            f"{priced['share']:g}",
            f"{priced['parameters']:.3g}",
            f"{priced['tokens']:.3g}",
            f"{priced['tokens'] / priced['parameters']:.1f}",
            f"{priced['loss']:.4f}",
            f"{priced['loss'] - plan['price'][0]['loss']:.4f}",
            f"{priced['same_loss_tokens']:.3g}" if reaches else "never",
            f"{priced['same_loss_flops'] / plan['flops']:.2f} x" if reaches else "",
        )
    return table


def _objective_name(delta: float | None) -> str:
    if delta is None:
        return "least squares in nats"
    if delta == 0:
        return "least absolute deviations of ln L (delta -> 0)"
    return f"Huber loss of ln L, delta {delta:g}"


def _confidence(interval: Sequence[float] | None) -> str:
    return f" (95 % {format_interval(interval)})" if interval else ""


def _count_resamples(resamples: dict[str, Any]) -> int:
    return len(next(iter(resamples.values()), ()))


def _constants_table(constants: dict[str, Any], values: dict[str, Any], resamples: int) -> Table:
    title = f"{resamples:,} resamples" if resamples else "no intervals: --bootstrap 0"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", title=title)
    table.add_column("")
    table.add_column("value", justify="right")
    if resamples:
        table.add_column(f"{LEVEL:.0%} from", justify="right")
        table.add_column("to", justify="right")
    for name, value in constants.items():
        ends = values["intervals"][name] if resamples else ()
        cells = (
            ("held",)
            if ends is None
            else tuple("open" if end is None else f"{end:.5g}" for end in ends)
        )
        table.add_row(name, f"{value:.5g}", *cells)
    return table


def _print_warnings(warnings: Sequence[str]) -> None:
    for warning in warnings:
        echo(f"warning: {warning}")


def _sensitivity_table(sensitivity: list[dict[str, Any]]) -> Table:
    names = list(sensitivity[0]["constants"])
    table = build_table(
        (
            "the same fit without some runs; L: compute-optimal loss at"
            f" {BEYOND:g} times the largest compute"
        ),
        (),
    )
    table.add_column("", overflow="fold")
    for heading in ("runs", *names, "L"):
        table.add_column(heading, justify="right", no_wrap=True)
    for left_out in sensitivity:
        table.add_row(
            left_out["what"],
            str(left_out["runs"]),
            *(f"{left_out['constants'][name]:.4g}" for name in names),
            f"{left_out['loss']:.4f}",
        )
    return table
