"""Plot of a calibration: predicted probability against observed frequency, with intervals."""

from __future__ import annotations

from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nextpt.base.plots import COLOURS, SETTINGS, legend_below
from nextpt.observe.curves import Plot, finish


def plot_calibration(calibration: dict[str, Any], name: str) -> Plot:
    """Plot a calibration.

    Args:
        calibration: See `Calibration.as_dict`.
        name: Of the text that it was measured on, for the title.
    """
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(9.6, 4.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        _curve(left, calibration["top"], COLOURS[0])
        left.set(
            xlim=(0, 1),
            ylim=(0, 1),
            xlabel="probability of the most probable token",
            ylabel="observed frequency",
        )
        right.set(xscale="log", yscale="log")
        _curve(right, calibration["every"], COLOURS[1])
        bins = [b for b in calibration["every"] if b["observed"] > 0]
        least = min((min(b["predicted"], b["interval"][0]) for b in bins), default=1e-6)
        right.set(
            xlim=(least / 2, 1.3),
            ylim=(least / 2, 1.3),
            xlabel="predicted probability, every token of the vocabulary",
            ylabel="observed frequency",
        )
        left.set_title(
            f"Most probable token: expected error {calibration['expected_calibration_error']:.3f}",
            loc="left",
            fontsize=10,
        )
        right.set_title("All tokens", loc="left", fontsize=10)
        title = f"Calibration on {name}, {calibration['positions']:,} positions"
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    points = "; ".join(
        f"{b['predicted']:.3f} observed {b['observed']:.3f}" for b in calibration["top"]
    )
    return finish(figure, title, f"{title}. Most probable token, predicted and observed: {points}")


def _curve(axes: Axes, bins: list[dict[str, Any]], colour: str) -> None:
    """Plot points with intervals, and the diagonal of a calibrated model.

    A logarithmic axis cannot show frequencies of 0.
    """
    axes.plot([1e-9, 1], [1e-9, 1], color="#777777", linestyle=":", linewidth=1, label="calibrated")
    kept = [b for b in bins if b["observed"] > 0 or axes.get_yscale() == "linear"]
    x, y = [b["predicted"] for b in kept], [b["observed"] for b in kept]
    errors = [
        [b["observed"] - b["interval"][0] for b in kept],
        [b["interval"][1] - b["observed"] for b in kept],
    ]
    axes.errorbar(
        x,
        y,
        yerr=errors,
        color=colour,
        marker="o",
        markersize=4,
        linewidth=1.2,
        capsize=2,
        label="this model, 95 % intervals",
    )
    legend_below(axes)
