"""Plots of scaling laws: the fit beside its runs, and compute-optimal sizes against compute."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from nextpt.base.errors import ScalingError
from nextpt.base.plots import BLUE, GREY, ORANGE, SETTINGS, check_plot_path, legend_below, save_plot
from nextpt.scaling.allocation import interval, optimum
from nextpt.scaling.fitting import Fit
from nextpt.scaling.frontier import Frontier

LEVEL = 0.9  # of the bands
POINTS = 60
MAX_CURVES = 8  # sizes whose curve is plotted


def check_plot(path: Path, form: str) -> None:
    """Raise UserError for a plot that cannot be written, before any work is done."""
    if form == "repeated":
        raise ScalingError("--plot: there is no plot of the form repeated")
    check_plot_path(path)


def plot_fit(fit: Fit | Frontier, path: Path) -> None:
    """Write a plot in the format of the name's suffix. Raises UserError."""
    with matplotlib.rc_context(SETTINGS):
        if isinstance(fit, Fit):
            figure = Figure(figsize=(10, 4.4), layout="constrained")
            left, right = figure.subplots(1, 2)
            plot_losses(left, fit, figure)
            _plot_optimal(right, fit)
        else:
            is_isoflop = any(optimum.valley for optimum in fit.optima)
            width = 10 if is_isoflop else 6.4
            figure = Figure(figsize=(width, 4.4), layout="constrained")
            axes = figure.subplots(1, 2 if is_isoflop else 1, squeeze=False)[0]
            if is_isoflop:
                plot_valleys(axes[0], fit, figure)
            _plot_frontier(axes[-1], fit)
        save_plot(figure, path)


def plot_losses(axes: Axes, fit: Fit, figure: Figure) -> None:
    """Plot the runs as points, coloured by size, and the law's curves of some sizes."""
    runs = fit.runs
    norm = LogNorm(runs.parameters.min(), runs.parameters.max())
    colours = matplotlib.colormaps["viridis"]
    axes.scatter(runs.flops, runs.loss, c=runs.parameters, norm=norm, cmap=colours, s=14, zorder=3)
    sizes = runs.sizes()
    for size in (
        sizes[i] for i in np.unique(np.linspace(0, len(sizes) - 1, MAX_CURVES).astype(int))
    ):
        n = float(runs.parameters[size].mean())
        tokens = np.geomspace(runs.tokens[size].min() / 1.5, runs.tokens[size].max() * 1.5, POINTS)
        axes.plot(6 * n * tokens, fit.loss(n, tokens), color=colours(norm(n)), linewidth=1)
    best = np.geomspace(runs.flops.min(), runs.flops.max(), POINTS)
    axes.plot(
        best,
        [float(fit.loss(*optimum(fit.law, fit.constants, c))) for c in best],
        color=ORANGE,
        linewidth=1.6,
        label="compute-optimal",
    )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="training compute C = 6 N D, FLOPs",
        ylabel=f"loss, {runs.loss_unit}",
    )
    axes.set_ylim(0.97 * runs.loss.min(), 1.03 * runs.loss.max())
    ticks = np.geomspace(runs.loss.min(), runs.loss.max(), 6)
    axes.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_title(f"{len(runs)} runs and the law ({fit.law.name})", loc="left", fontweight="bold")
    legend_below(axes)
    figure.colorbar(ScalarMappable(norm, colours), ax=axes, label="parameters N", pad=0.01)


def _plot_optimal(axes: Axes, fit: Fit) -> None:
    """Plot the optimal N with the bootstrap's band, to 100 times the largest compute."""
    runs = fit.runs
    budgets = np.geomspace(runs.flops.min(), 100 * runs.flops.max(), POINTS)
    axes.scatter(runs.flops, runs.parameters, s=8, color=GREY, label="runs")
    axes.plot(
        budgets,
        [float(optimum(fit.law, fit.constants, c)[0]) for c in budgets],
        color=BLUE,
        label="compute-optimal N",
    )
    if fit.resamples:
        _plot_band(axes, budgets, [optimum(fit.law, fit.resamples, c)[0] for c in budgets])
    _finish_optimal(axes, runs.flops.max())


def _plot_frontier(axes: Axes, frontier: Frontier) -> None:
    budgets = np.geomspace(
        min(o.flops for o in frontier.optima), 100 * max(o.flops for o in frontier.optima), POINTS
    )
    axes.scatter(
        [o.flops for o in frontier.optima],
        [o.parameters for o in frontier.optima],
        s=12,
        color=GREY,
        label="best size",
    )
    axes.plot(
        budgets,
        [frontier.parameters(c) for c in budgets],
        color=BLUE,
        label=f"N = k C^{frontier.a:.3f}",
    )
    if len(frontier.resamples):
        _plot_band(axes, budgets, [frontier.parameter_resamples(c) for c in budgets])
    _finish_optimal(axes, max(o.flops for o in frontier.optima))


def plot_valleys(axes: Axes, frontier: Frontier, figure: Figure) -> None:
    """Plot the runs by compute, the parabola of each amount of it, and its minimum."""
    runs = frontier.runs
    norm = LogNorm(runs.flops.min(), runs.flops.max())
    colours = matplotlib.colormaps["viridis"]
    axes.scatter(runs.parameters, runs.loss, c=runs.flops, norm=norm, cmap=colours, s=10)
    for best in frontier.optima:
        if best.valley is None:
            continue
        sizes = np.geomspace(best.valley.low, best.valley.high, POINTS)
        logs = best.valley.curvature / 2 * np.log(sizes / best.parameters) ** 2
        axes.plot(sizes, best.loss * np.exp(logs), color=colours(norm(best.flops)), linewidth=1.2)
    axes.scatter(
        [best.parameters for best in frontier.optima],
        [best.loss for best in frontier.optima],
        marker="x",
        s=30,
        color=ORANGE,
        zorder=3,
        label="minimum of a parabola",
    )
    axes.set(xscale="log", yscale="log", xlabel="parameters N", ylabel=f"loss, {runs.loss_unit}")
    axes.set_title(f"{len(runs)} runs by compute", loc="left", fontweight="bold")
    legend_below(axes)
    figure.colorbar(ScalarMappable(norm, colours), ax=axes, label="compute C, FLOPs", pad=0.01)


def _plot_band(axes: Axes, budgets: np.ndarray, resamples: list[np.ndarray]) -> None:
    ends = [interval(values, LEVEL) for values in resamples]
    axes.fill_between(
        budgets,
        [low for low, _ in ends],
        [high for _, high in ends],
        color=BLUE,
        alpha=0.2,
        linewidth=0,
        label=f"{LEVEL:.0%} interval",
    )


def _finish_optimal(axes: Axes, largest: float) -> None:
    axes.axvline(largest, color=GREY, linestyle=":", linewidth=1)
    axes.annotate(
        "extrapolated",
        (largest, 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        color=GREY,
    )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="training compute C = 6 N D, FLOPs",
        ylabel="compute-optimal N",
    )
    axes.set_title("Compute-optimal size", loc="left", fontweight="bold")
    legend_below(axes)
