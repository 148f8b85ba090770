"""Plot of an ablation: differences from the baseline per domain, with intervals and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nextpt.base.plots import COLOURS, GREY, SETTINGS, save_plot

SPREAD = 0.5  # width that the variants of a domain share, in domains


def plot_ablation(result: dict[str, Any], path: Path) -> None:
    """Plot the content of DIR/ablation.json. Raises UserError."""
    baseline, variants, seeds = result["baseline"], result["variants"], len(result["seeds"])
    names = [*baseline["domains"], "total"]
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(2.4 + 1.7 * len(names), 4.2), layout="constrained")
        axes = figure.subplots()
        axes.axhline(0, color=GREY, linewidth=1)
        for number, variant in enumerate(variants):
            offset = SPREAD * ((number + 0.5) / len(variants) - 0.5)
            _plot_variant(axes, variant, offset, COLOURS[number % len(COLOURS)], seeds)
        labels = [
            f"{name}\n{figures['bpb']:.3f}"
            for name, figures in (*baseline["domains"].items(), ("total", baseline["total"]))
        ]
        axes.set_xticks(range(len(names)), labels)
        axes.set(
            xlabel=f"domain, and bits per byte of {baseline['name']} there",
            ylabel=f"difference from {baseline['name']}, bits per byte",
            xlim=(-0.6, len(names) - 0.4),
        )
        axes.set_title("Below 0: better than the baseline", loc="left", fontweight="bold")
        figure.legend(loc="outside lower left", ncols=2, fontsize=8)
        save_plot(figure, path)


def _plot_variant(
    axes: Axes, variant: dict[str, Any], offset: float, colour: str, seeds: int
) -> None:
    """Plot means with their intervals, and a ring for each of several seeds beside them."""
    figures = [*variant["domains"].values(), variant["total"]]
    means = [f["difference"] for f in figures]
    reach = [
        [max(f["difference"] - f["interval"][0], 0) if f["interval"] else 0 for f in figures],
        [max(f["interval"][1] - f["difference"], 0) if f["interval"] else 0 for f in figures],
    ]
    label = (
        f"{variant['name']}{f', mean of {seeds} seeds' if seeds > 1 else ''}; 95 % interval over"
        " documents"
    )
    axes.errorbar(
        [i + offset for i in range(len(figures))],
        means,
        yerr=reach,
        linestyle="none",
        marker="o",
        markersize=5,
        capsize=3,
        color=colour,
        label=label,
    )
    if seeds > 1:
        axes.scatter(
            [i + offset + 0.07 for i, f in enumerate(figures) for _ in f["by_seed"]],
            [value for f in figures for value in f["by_seed"]],
            s=16,
            facecolors="none",
            edgecolors=colour,
            linewidths=1,
            label=f"{variant['name']}, each seed",
        )
