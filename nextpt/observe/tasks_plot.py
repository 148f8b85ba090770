"""Plot of tasks: exact match and answer loss, of one checkpoint or against held-out loss."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nextpt.base.plots import COLOURS, SETTINGS, legend_below, save_plot, set_title
from nextpt.observe.evaluation_plot import error_bars, model_and_step

LABELS = {
    "exact": "exact match, fraction of items",
    "probability": "probability of the answer",
    "nats_per_token": "nats per answer token",
}


def plot_tasks(results: list[dict[str, Any]], path: Path) -> None:
    """Plot the results of `nextpt eval --tasks`, one per checkpoint, lowest step first.

    Raises UserError.
    """
    last = results[-1]
    panels = [
        (label, [{name: of[key] for name, of in at["tasks"].items()} for at in results])
        for key, label in LABELS.items()
        if last["tasks"]
    ]
    if "harness" in last:
        panels.append(("metric of lm-evaluation-harness", [_flat(at["harness"]) for at in results]))
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(4 * len(panels), 4), layout="constrained")
        for axes, (label, figures) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            if len(results) > 1:
                _over_loss(axes, [at["loss"]["bpb"] for at in results], figures)
            else:
                _plot_single(axes, figures[0])
            axes.set_ylabel(label)
            if label == LABELS["exact"]:
                axes.set_ylim(-0.03, 1.03)
                _chance(axes, last["tasks"]) if len(results) == 1 else None
            if axes.get_legend_handles_labels()[0] and label in (LABELS["exact"], panels[-1][0]):
                legend_below(axes)
        subject = model_and_step(last)
        if len(results) > 1:
            subject = f"{model_and_step(last | {'step': None})}, {len(results)} checkpoints"
        set_title(figure, f"{subject}: tasks, 95 % intervals from items")
        save_plot(figure, path)


def _flat(harness: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{task} {metric.partition(',')[0]}": figure
        for task, figures in harness.items()
        for metric, figure in figures.items()
    }


def _over_loss(axes: Axes, loss: list[float], figures: list[dict[str, Any]]) -> None:
    """Plot against the loss, which falls to the right: training goes to the right."""
    for colour, name in zip(itertools.cycle(COLOURS), figures[-1], strict=False):
        _points(axes, loss, [at[name] for at in figures], label=name, color=colour)
    axes.set_xlabel("held-out loss, bits per byte")
    axes.invert_xaxis()


def _plot_single(axes: Axes, figures: dict[str, Any]) -> None:
    _points(axes, range(len(figures)), list(figures.values()), linestyle="none", color=COLOURS[0])
    axes.set_xticks(range(len(figures)), list(figures), fontsize=8, rotation=20)
    axes.margins(x=0.15)


def _chance(axes: Axes, tasks: dict[str, Any]) -> None:
    chances = [(i, of["chance"]) for i, of in enumerate(tasks.values()) if of["chance"] is not None]
    if chances:
        positions, values = [i for i, _ in chances], [chance for _, chance in chances]
        axes.scatter(positions, values, marker="_", s=200, color="0.5", label="chance")


def _points(axes: Axes, x: Any, figures: list[dict[str, Any]], **style: Any) -> None:
    values = [f["value"] for f in figures]
    axes.errorbar(
        x,
        values,
        yerr=error_bars(values, [f["interval"] for f in figures]),
        marker="o",
        markersize=4,
        capsize=3,
        **style,
    )
