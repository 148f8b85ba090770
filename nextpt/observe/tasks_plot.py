"""The picture of tasks: exact match and loss of answers, for one checkpoint or over the held-out loss of all."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nextpt.base.errors import DataError
from nextpt.observe.curves import COLOURS, SETTINGS
from nextpt.observe.evaluation_plot import whiskers

LABELS = {
    "exact": "exact match, share of items",
    "probability": "probability of the answer",
    "nats_per_token": "nats per answer token",
}


def plot_tasks(found: list[dict[str, Any]], path: Path) -> None:
    """Draw what `nextpt eval --tasks --json` writes of each checkpoint, lowest step first.

    Raises DataError.
    """
    last = found[-1]
    panels = [
        (label, [{name: of[key] for name, of in at["tasks"].items()} for at in found])
        for key, label in LABELS.items()
        if last["tasks"]
    ]
    if "harness" in last:
        panels.append(("metric of lm-evaluation-harness", [_flat(at["harness"]) for at in found]))
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(4 * len(panels), 4), layout="constrained")
        for axes, (label, figures) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            if len(found) > 1:
                _over_loss(axes, [at["loss"]["bpb"] for at in found], figures)
            else:
                _one(axes, figures[0])
            axes.set_ylabel(label)
            if label == LABELS["exact"]:
                axes.set_ylim(-0.03, 1.03)
                _chance(axes, last["tasks"]) if len(found) == 1 else None
            if axes.get_legend_handles_labels()[0] and label in (LABELS["exact"], panels[-1][0]):
                axes.legend(fontsize=8)
        name = Path(last.get("run") or last["model"]).name
        at = (
            ""
            if last["step"] is None
            else f", step {last['step']:,}"
            if len(found) == 1
            else f", {len(found)} checkpoints"
        )
        figure.suptitle(
            f"{name}{at}: tasks, 95 % intervals from items",
            x=0.01,
            ha="left",
            fontweight="bold",
            fontsize=11,
        )
        try:
            figure.savefig(path, dpi=150)
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror}") from error


def _flat(harness: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{task} {metric.partition(',')[0]}": figure
        for task, figures in harness.items()
        for metric, figure in figures.items()
    }


def _over_loss(axes: Axes, loss: list[float], figures: list[dict[str, Any]]) -> None:
    """Training goes to the right: the loss falls."""
    for colour, name in zip(itertools.cycle(COLOURS), figures[-1], strict=False):
        _points(axes, loss, [at[name] for at in figures], label=name, color=colour)
    axes.set_xlabel("held-out loss, bits per byte")
    axes.invert_xaxis()


def _one(axes: Axes, figures: dict[str, Any]) -> None:
    _points(axes, range(len(figures)), list(figures.values()), linestyle="none", color=COLOURS[0])
    axes.set_xticks(range(len(figures)), list(figures), fontsize=8, rotation=20)
    axes.margins(x=0.15)


def _chance(axes: Axes, tasks: dict[str, Any]) -> None:
    places = [(i, of["chance"]) for i, of in enumerate(tasks.values()) if of["chance"] is not None]
    if places:
        axes.scatter(*zip(*places, strict=True), marker="_", s=200, color="0.5", label="chance")


def _points(axes: Axes, x: Any, figures: list[dict[str, Any]], **style: Any) -> None:
    values = [f["value"] for f in figures]
    axes.errorbar(
        x,
        values,
        yerr=whiskers(values, [f["interval"] for f in figures]),
        marker="o",
        markersize=4,
        capsize=3,
        **style,
    )
