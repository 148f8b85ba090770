"""Plots of memorization: agreement by length of the prefix, canaries by number of repeats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from nextpt.base.errors import DataError
from nextpt.base.plots import COLOURS, SETTINGS, legend_below

SIDES = {"train": COLOURS[1], "validation": COLOURS[0]}
NAMES = {"train": "training documents", "validation": "held-out documents"}


def plot_extraction(result: dict[str, Any], path: Path) -> None:
    """Plot the result of `nextpt memorization extract`. Raises DataError."""
    figure = _figure()
    columns = (
        ("score", "mean", "tokens that agree, %"),
        ("exact", "share", "all tokens agree, %"),
    )
    for axes, (key, part, title) in zip(figure.axes, columns, strict=True):
        for side, colour in SIDES.items():
            points = {int(p): f[key] for p, f in result[side]["prefixes"].items()}
            # Side by side, so that both error bars are visible
            positions = [p * (1.03 if side == "train" else 1 / 1.03) for p in points]
            _points(axes, positions, list(points.values()), part, 100, colour, NAMES[side])
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(points), [str(p) for p in points])
        axes.set_xlabel("prefix, tokens")
        axes.set_ylabel(title)
        axes.set_ylim(bottom=0)
    legend_below(figure.axes[0])
    figure.suptitle(
        f"greedy continuations of {result['continuation']} tokens, step {result['step']}; bars: 95"
        " % intervals",
        fontsize=10,
    )
    _save(figure, path)


def plot_canaries(result: dict[str, Any], path: Path) -> None:
    """Plot the result of `nextpt memorization canaries`. Raises DataError."""
    figure, by_repeats = _figure(), result["by_repeats"]
    positions: list[float] = list(range(len(by_repeats)))
    columns = (
        ("exposure_bits", "mean", 1, "exposure, bits"),
        ("extracted", "share", 100, "extracted, %"),
    )
    for axes, (key, part, scale, title) in zip(figure.axes, columns, strict=True):
        _points(
            axes, positions, [f[key] for f in by_repeats.values()], part, scale, COLOURS[0], None
        )
        axes.set_xticks(positions, [r if int(r) else "never" for r in by_repeats])
        axes.set_xlabel("times shown in the corpus")
        axes.set_ylabel(title)
        axes.set_ylim(bottom=0)
    figure.suptitle(f"planted texts, step {result['step']}; bars: 95 % intervals", fontsize=10)
    _save(figure, path)


def _figure() -> Figure:
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        figure.subplots(1, 2)
    return figure


def _points(
    axes: Any,
    positions: list[float],
    values: list[dict[str, Any]],
    part: str,
    scale: float,
    colour: str,
    name: str | None,
) -> None:
    middle = [scale * v[part] for v in values]
    below = [
        m - scale * (v["low"] if v["low"] is not None else v[part])
        for m, v in zip(middle, values, strict=True)
    ]
    above = [
        scale * (v["high"] if v["high"] is not None else v[part]) - m
        for m, v in zip(middle, values, strict=True)
    ]
    bars = [[max(b, 0) for b in below], [max(a, 0) for a in above]]
    axes.errorbar(
        positions,
        middle,
        yerr=bars,
        color=colour,
        marker="o",
        markersize=4,
        capsize=3,
        label=name,
        clip_on=False,
    )


def _save(figure: Figure, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be written: {error}") from error
