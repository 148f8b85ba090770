"""Plot of the exposure bias: loss by position in a continuation, and the parts of the gap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nextpt.base.plots import COLOURS, SETTINGS, legend_below, save_plot, set_title
from nextpt.observe.evaluation_plot import model_and_step


def plot_exposure(result: dict[str, Any], path: Path) -> None:
    """Plot the result of `nextpt eval --exposure-bias`, all domains together, 95 % intervals.

    Raises UserError.
    """
    rows, p = result["by_position"], result["protocol"]
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(10, 4), layout="constrained")
        first, second = figure.subplots(1, 2)
        for colour, (name, label) in zip(
            COLOURS,
            (("real", "real text"), ("sampled", "its own, sampled"), ("greedy", "its own, greedy")),
            strict=False,
        ):
            _curve(first, rows, name, label, colour)
        for colour, name in zip(COLOURS[3:], ("miscalibration", "drift"), strict=False):
            _curve(second, rows, name, name, colour)
        second.axhline(0, color="0.6", linewidth=1)
        first.set_ylabel("nats per token")
        second.set_ylabel("part of the gap, nats per token")
        for axes in (first, second):
            axes.set_xscale("log", base=2)
            axes.set_xlabel("position in the continuation, tokens")
            legend_below(axes)
        set_title(
            figure,
            f"{model_and_step(result)}: after {p['prefix']} tokens of held-out text, 95 % intervals"
            " from documents",
        )
        save_plot(figure, path)


def _curve(axes: Axes, rows: list[dict[str, Any]], name: str, label: str, colour: str) -> None:
    x = [(row["from"] * row["to"]) ** 0.5 for row in rows]
    axes.plot(
        x, [row[name]["value"] for row in rows], marker="o", markersize=4, label=label, color=colour
    )
    ends = [row[name]["interval"] or [row[name]["value"]] * 2 for row in rows]
    axes.fill_between(
        x,
        [low for low, _ in ends],
        [high for _, high in ends],
        color=colour,
        alpha=0.15,
        linewidth=0,
    )
