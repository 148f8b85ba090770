"""Pictures of scaling laws: the fit beside its runs, and compute-optimal sizes against compute."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from nextpt.base.errors import ScalingError
from nextpt.scaling.allocation import interval, optimum
from nextpt.scaling.fitting import Fit
from nextpt.scaling.frontier import Frontier

KINDS = (".svg", ".png", ".pdf")
LEVEL = 0.9  # of the bands
POINTS = 60
MOST_LINES = 8  # sizes whose curve is drawn
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"
SETTINGS = {
    "svg.hashsalt": "nextpt",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def check_plot_format(path: Path, form: str) -> None:
    """Raises ScalingError for a picture that cannot be drawn, before any work is done."""
    if form == "repeated":
        raise ScalingError("--plot: there is no picture of the form repeated")
    if path.suffix not in KINDS:
        raise ScalingError(f"--plot {path}: the name must end in {', '.join(KINDS)}")


def plot_fit(found: Fit | Frontier, path: Path) -> None:
    """Write a picture of the kind that the name's ending chooses.

    Raises ScalingError when it cannot be written.
    """
    with matplotlib.rc_context(SETTINGS):
        if isinstance(found, Fit):
            figure = Figure(figsize=(10, 4.4), layout="constrained")
            left, right = figure.subplots(1, 2)
            _losses(left, found, figure)
            _optimal(right, found)
        else:
            figure = Figure(figsize=(6.4, 4.4), layout="constrained")
            _frontier(figure.subplots(), found)
        try:
            figure.savefig(
                path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None
            )
        except OSError as error:
            raise ScalingError(f"{path} cannot be written: {error.strerror}") from error


def _losses(axes: Axes, fit: Fit, figure: Figure) -> None:
    """Runs as points, coloured by size, and the law's curve of some sizes."""
    runs = fit.runs
    norm = LogNorm(runs.parameters.min(), runs.parameters.max())
    colours = matplotlib.colormaps["viridis"]
    axes.scatter(runs.flops, runs.loss, c=runs.parameters, norm=norm, cmap=colours, s=14, zorder=3)
    sizes = runs.sizes()
    for size in (
        sizes[i] for i in np.unique(np.linspace(0, len(sizes) - 1, MOST_LINES).astype(int))
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
        ylabel="loss, nats per token",
    )
    axes.set_ylim(0.97 * runs.loss.min(), 1.03 * runs.loss.max())
    ticks = np.geomspace(runs.loss.min(), runs.loss.max(), 6)
    axes.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_title(f"{len(runs)} runs and the law ({fit.law.name})", loc="left", fontweight="bold")
    axes.legend(loc="upper right")
    figure.colorbar(ScalarMappable(norm, colours), ax=axes, label="parameters N", pad=0.01)


def _optimal(axes: Axes, fit: Fit) -> None:
    """Compute-optimal N against compute, with the band of the bootstrap, to a hundred times the largest run."""
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
        bands = [interval(optimum(fit.law, fit.resamples, c)[0], LEVEL) for c in budgets]
        axes.fill_between(
            budgets,
            *zip(*bands, strict=True),
            color=BLUE,
            alpha=0.2,
            linewidth=0,
            label=f"{LEVEL:.0%} interval",
        )
    _finish_optimal(axes, runs.flops.max())


def _frontier(axes: Axes, found: Frontier) -> None:
    budgets = np.geomspace(
        min(o.flops for o in found.optima), 100 * max(o.flops for o in found.optima), POINTS
    )
    axes.scatter(
        [o.flops for o in found.optima],
        [o.parameters for o in found.optima],
        s=12,
        color=GREY,
        label="best size found",
    )
    axes.plot(
        budgets, [found.parameters(c) for c in budgets], color=BLUE, label=f"N = k C^{found.a:.3f}"
    )
    if len(found.resamples):
        bands = [interval(found.parameter_resamples(c), LEVEL) for c in budgets]
        axes.fill_between(
            budgets,
            *zip(*bands, strict=True),
            color=BLUE,
            alpha=0.2,
            linewidth=0,
            label=f"{LEVEL:.0%} interval",
        )
    _finish_optimal(axes, max(o.flops for o in found.optima))


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
        ylabel="parameters N",
    )
    axes.set_title("Compute-optimal size", loc="left", fontweight="bold")
    axes.legend(loc="upper left")
