"""Plot of an evaluation: bits per byte, loss by context and by token frequency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nextpt.base.plots import COLOURS, SETTINGS, legend_below, save_plot, set_title


def plot_evaluation(result: dict[str, Any], path: Path) -> None:
    """Plot the result of `nextpt eval`, with 95 % intervals. Raises UserError."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(12, 4), layout="constrained")
        first, second, third = figure.subplots(1, 3)
        if "checkpoints" in result:
            _checkpoints(first, result["checkpoints"])
        else:
            _domains(first, result)
        _contexts(second, result["by_context"])
        _bands(third, result["by_frequency"])
        protocol = f"context {result['window']}, stride {result['stride']}"
        set_title(figure, f"{model_and_step(result)}: {protocol}, 95 % intervals from documents")
        save_plot(figure, path)


def model_and_step(result: dict[str, Any]) -> str:
    """Return the name of the evaluated run or model, and the step of its checkpoint."""
    name = Path(result.get("run") or result["model"]).name
    return name if result["step"] is None else f"{name}, step {result['step']:,}"


def error_bars(values: list[float], intervals: list[list[float] | None]) -> list[list[float]]:
    """Return the lengths of the error bars below and above; 0 where there is no interval."""
    kept = [interval or [value, value] for value, interval in zip(values, intervals, strict=True)]
    return [
        [max(v - low, 0) for v, (low, _) in zip(values, kept, strict=True)],
        [max(high - v, 0) for v, (_, high) in zip(values, kept, strict=True)],
    ]


def _points(
    axes: Axes, x: Any, values: list[float], intervals: list[list[float] | None], **style: Any
) -> None:
    axes.errorbar(
        x, values, yerr=error_bars(values, intervals), marker="o", markersize=4, capsize=3, **style
    )


def _domains(axes: Axes, result: dict[str, Any]) -> None:
    figures = [*result["domains"].items(), ("total", result["total"])]
    for offset, key, label in (
        (-0.1, "bpb", "text only"),
        (0.1, "bpb_with_eod", "with ends of documents"),
    ):
        _points(
            axes,
            [i + offset for i in range(len(figures))],
            [f[key] for _, f in figures],
            [f["intervals"][key] for _, f in figures],
            linestyle="none",
            label=label,
            color=COLOURS[offset > 0],
        )
    axes.set_xticks(range(len(figures)), [name for name, _ in figures])
    axes.set(ylabel="bits per byte", xlabel="domain")
    axes.margins(x=0.15, y=0.15)
    legend_below(axes)


def _checkpoints(axes: Axes, checkpoints: list[dict[str, Any]]) -> None:
    steps = [at["step"] for at in checkpoints]
    for colour, name in zip([*COLOURS[1:], *COLOURS[1:]], checkpoints[0]["domains"], strict=False):
        _points(
            axes,
            steps,
            [at["domains"][name]["bpb"] for at in checkpoints],
            [at["domains"][name]["intervals"]["bpb"] for at in checkpoints],
            label=name,
            color=colour,
        )
    _points(
        axes,
        steps,
        [at["total"]["bpb"] for at in checkpoints],
        [at["total"]["intervals"]["bpb"] for at in checkpoints],
        label="total",
        color=COLOURS[0],
        linewidth=2,
    )
    axes.set(xlabel="step", ylabel="bits per byte")
    legend_below(axes)


def _contexts(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Plot document starts and later windows apart: their tokens do not compare."""
    for colour, is_start, label in (
        (COLOURS[0], True, "start of a document"),
        (COLOURS[1], False, "later windows"),
    ):
        if group := [row for row in rows if row["document_start"] == is_start]:
            _points(
                axes,
                [(row["from"] * row["to"]) ** 0.5 for row in group],
                [row["nats_per_token"] for row in group],
                [row["interval"] for row in group],
                color=colour,
                label=label,
            )
    legend_below(axes)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens of context", ylabel="nats per token")


def _bands(axes: Axes, frequency: dict[str, Any]) -> None:
    rows = frequency["bands"]
    _points(
        axes,
        range(len(rows)),
        [row["nats_per_token"] for row in rows],
        [row["interval"] for row in rows],
        color=COLOURS[0],
    )
    axes.set_xticks(
        range(len(rows)),
        [
            f"≥ {row['from']:.0e}" if row["from"] else "rarer" if row["to"] else "never"
            for row in rows
        ],
        fontsize=8,
    )
    axes.set(
        xlabel=f"frequency of the token in the {frequency['counted_in']}", ylabel="nats per token"
    )
