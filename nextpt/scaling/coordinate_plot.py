"""Plot of a coordinate check: change of activations against width or depth, by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from nextpt.base.plots import SETTINGS, save_plot, set_title
from nextpt.scaling.coordinate_check import JUDGED, Sweep

NAMES = {"last_block": "last block", "final_norm": "final norm", "logits": "logits"}


def plot_sweeps(sweeps: Sequence[Sweep], title: str, path: Path) -> None:
    """Write a plot with a row of axes for each sweep, in the format of the path's suffix.

    Raises:
        UserError: The file cannot be written.
    """
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(10, 3.4 * len(sweeps)), layout="constrained")
        rows = figure.subplots(len(sweeps), len(JUDGED), squeeze=False)
        for sweep, row in zip(sweeps, rows, strict=True):
            for place, axes in zip(JUDGED, row, strict=True):
                _plot_place(axes, sweep, place)
            row[0].set_ylabel("mean |x_t - x_0|")
            row[-1].legend(title="step t", loc="center left", bbox_to_anchor=(1, 0.5))
        set_title(figure, title)
        save_plot(figure, path)


def _plot_place(axes: Axes, sweep: Sweep, place: str) -> None:
    colours = matplotlib.colormaps["viridis"]
    for step in range(1, sweep.steps + 1):
        changes = [sweep.mean("changes", place, step, value) for value in sweep.values]
        colour = colours((step - 1) / max(sweep.steps - 1, 1) * 0.9)
        axes.plot(sweep.values, changes, "o-", markersize=3, color=colour, label=str(step))
    axes.set(xscale="log", yscale="log", xlabel=sweep.axis)
    axes.set_xticks(sweep.values, [str(value) for value in sweep.values])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title(f"{NAMES[place]}: slope {sweep.judged_slope(place):+.2f}", loc="left")
