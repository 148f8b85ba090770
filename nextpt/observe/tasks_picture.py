"""The picture of tasks: exact match and loss of answers, for one checkpoint or over the held-out loss of all."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nextpt.errors import DataError
from nextpt.observe.curves import COLOURS, SETTINGS
from nextpt.observe.evaluation_picture import whiskers

LABELS = {"exact": "exact match, share of items", "probability": "probability of the answer", "nats_per_token": "nats per answer token"}


def draw_tasks(found: list[dict[str, Any]], path: Path) -> None:
    """Draw what `nextpt eval --tasks --json` writes of each checkpoint, lowest step first. Raises DataError."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(12, 4), layout="constrained")
        for axes, (key, label) in zip(figure.subplots(1, 3), LABELS.items(), strict=True):
            _over_loss(axes, found, key) if len(found) > 1 else _one(axes, found[0]["tasks"], key)
            axes.set_ylabel(label)
            if key == "exact":
                axes.set_ylim(-0.03, 1.03)
                if len(found) > 1:
                    axes.legend(fontsize=8)
        last = found[-1]
        name = Path(last.get("run") or last["model"]).name
        at = "" if last["step"] is None else f", step {last['step']:,}" if len(found) == 1 else f", {len(found)} checkpoints"
        figure.suptitle(f"{name}{at}: tasks, 95 % intervals from items", x=0.01, ha="left", fontweight="bold", fontsize=11)
        try:
            figure.savefig(path, dpi=150)
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror}") from error


def _over_loss(axes: Axes, found: list[dict[str, Any]], key: str) -> None:
    """Training goes to the right: the loss falls."""
    x = [at["loss"]["bpb_text"] for at in found]
    for colour, task in zip(itertools.cycle(COLOURS), found[-1]["tasks"], strict=False):
        _points(axes, x, [at["tasks"][task][key] for at in found], label=task, color=colour)
    axes.set_xlabel("held-out loss, bits per byte")
    axes.invert_xaxis()


def _one(axes: Axes, tasks: dict[str, Any], key: str) -> None:
    _points(axes, range(len(tasks)), [of[key] for of in tasks.values()], linestyle="none", color=COLOURS[0])
    if key == "exact":
        chances = [(i, of["chance"]) for i, of in enumerate(tasks.values()) if of["chance"] is not None]
        axes.scatter(*zip(*chances, strict=True), marker="_", s=200, color="0.5", label="chance") if chances else None
        axes.legend(fontsize=8)
    axes.set_xticks(range(len(tasks)), list(tasks), fontsize=8, rotation=20)
    axes.margins(x=0.15)


def _points(axes: Axes, x: Any, figures: list[dict[str, Any]], **style: Any) -> None:
    values = [f["value"] for f in figures]
    axes.errorbar(x, values, yerr=whiskers(values, [f["interval"] for f in figures]), marker="o", markersize=4, capsize=3, **style)
