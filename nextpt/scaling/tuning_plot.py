"""Plot of a search: loss against learning rate and decay, with fitted curve and interval."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from nextpt.base.plots import BLUE, GREY, ORANGE, SETTINGS, legend_below, save_plot, set_title
from nextpt.scaling.optimum import Optimum
from nextpt.scaling.tuning import Tuned


def plot_tuning(tuned: Tuned, title: str, path: Path) -> None:
    """Write the plot, in the format of the path's suffix. Raises UserError."""
    optima = tuned.optima
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(5.2 * len(optima), 3.8), layout="constrained")
        row = figure.subplots(1, len(optima), squeeze=False)[0]
        for axes, (key, optimum) in zip(row, optima.items(), strict=True):
            _plot_optimum(axes, key, optimum)
        row[0].set_ylabel("validation loss, nats per token")
        set_title(figure, title)
        save_plot(figure, path)


def _plot_optimum(axes: Axes, key: str, optimum: Optimum) -> None:
    points = optimum.points
    trials = [(p.value, loss) for p in points for loss in p.losses if math.isfinite(loss)]
    values, losses = [value for value, _ in trials], [loss for _, loss in trials]
    axes.scatter(values, losses, s=16, facecolors="none", edgecolors=BLUE, label="seed")
    means = [(p.value, p.mean) for p in points if math.isfinite(p.mean)]
    if means:
        axes.plot(*zip(*means, strict=True), "o", markersize=4, color=BLUE, label="mean")
    if optimum.curve is not None:
        x = np.linspace(*optimum.curve.ends, 200)
        y = optimum.curve(x)
        axes.plot(optimum.center * 2**x, y, color=GREY, linewidth=1, label="fitted curve")
    axes.axvline(optimum.value, color=ORANGE, linewidth=1, label=f"best, {optimum.value:.3g}")
    if optimum.interval:
        meaning = f"{100 * optimum.level:g} % interval" if optimum.level else "neighbours"
        axes.axvspan(*optimum.interval, color=ORANGE, alpha=0.12, linewidth=0, label=meaning)
    for point in points:
        if point.diverged:
            axes.axvline(point.value, color=GREY, linewidth=1, linestyle=":")
            axes.annotate(
                " diverged", (point.value, 1), xycoords=("data", "axes fraction"), va="top"
            )
    edges = [point.value for point in points]
    axes.set(xscale="log", xlabel=f"{key} of the proxy", xlim=(edges[0] / 1.5, edges[-1] * 1.5))
    axes.set_xticks(edges, [f"{value:g}" for value in edges], fontsize=8)
    axes.xaxis.set_minor_locator(NullLocator())
    legend_below(axes)
