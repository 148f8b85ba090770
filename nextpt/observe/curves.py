"""Plots of runs for the report: matplotlib to SVG as data URIs, which need no other file."""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from nextpt.base.plots import COLOURS, SETTINGS, legend_below
from nextpt.observe.run_record import RunRecord

MAX_POINTS = 1500  # of a line; longer ones are thinned, keeping the extremes of every part
NOISE_SHARE = 0.2  # fraction of the run over which the noise scale is averaged
# Fraction of the run whose losses may leave the axes: the first steps would flatten all others
WARM_UP_SHARE = 0.05
# Lines of the validation: the weights that are trained, then their averages
LINE_STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Plot:
    """One plot of a page.

    Attributes:
        title: Title.
        uri: data URI of the SVG, for <img src>.
        alt: Text for those who cannot see it.
    """

    title: str
    uri: str
    alt: str

    @property
    def svg(self) -> bytes:
        """The SVG file."""
        return base64.b64decode(self.uri.partition(",")[2])


def report_plots(runs: list[RunRecord]) -> list[Plot]:
    """Return the plots of a report, in reading order; those without data are left out."""
    plots = [
        *_losses(runs, "nats per token", "nats_per_token", "nats_per_token"),
        *_losses(runs, "bits per byte", "bpb", "bpb"),
        _compressors(runs),
        _quantity(runs, "Learning rate", "learning rate", lambda e: e["lr"], smooth=False),
        _quantity(
            runs,
            "Gradient norm, before clipping",
            "global L2 norm",
            lambda e: e["grad_norm"] if e["grad_norm"] >= 0 else math.nan,
            log=True,
        ),
        _noise(runs),
        _updates(runs),
        _quantity(
            runs,
            "Throughput",
            "tokens per second, all ranks",
            lambda e: e["tokens_per_second"],
            from_zero=True,
            unit="",
        ),
        _quantity(runs, "Waiting for data", "fraction of the time, %", _waiting, from_zero=True),
        _quantity(
            runs,
            "Memory of the first rank",
            "bytes (peak on a GPU)",
            lambda e: e["memory_bytes"] or math.nan,
            from_zero=True,
            unit="B",
            smooth=False,
        ),
        _quantity(
            runs,
            "Model FLOPs utilization (MFU)",
            "fraction of the peak, %",
            lambda e: math.nan if e.get("mfu") is None else 100 * e["mfu"],
            from_zero=True,
        ),
    ]
    return [plot for plot in plots if plot]


def _waiting(event: dict[str, Any]) -> float:
    """Return the percentage of the logged interval in which rank 0 waited for its loader.

    _series adds `interval_tokens`.
    """
    seconds = event["interval_tokens"] / event["tokens_per_second"]
    return 100 * event["data_wait_seconds"] / seconds if seconds else math.nan


def thin(x: np.ndarray, y: np.ndarray, most: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Thin a line to about `most` points: the extremes of each part, so that no spike is lost."""
    if len(x) <= most:
        return x, y
    keep: set[int] = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), most // 2):
        values = y[part]
        if np.isfinite(values).any():
            keep |= {int(part[np.nanargmin(values)]), int(part[np.nanargmax(values)])}
    index = np.array(sorted(keep))
    return x[index], y[index]


def running_mean(y: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Return the mean over a centred window, a fraction `share` of the line, at least 5 points.

    Values that are not finite are left out.
    """
    half = max(int(len(y) * share / 2), 2)
    finite = np.isfinite(y)
    sums = np.concatenate(([0.0], np.cumsum(np.where(finite, y, 0.0))))
    counts = np.concatenate(([0], np.cumsum(finite)))
    low = np.maximum(np.arange(len(y)) - half, 0)
    high = np.minimum(np.arange(len(y)) + half + 1, len(y))
    n = counts[high] - counts[low]
    means = np.divide(sums[high] - sums[low], n, out=np.full(len(y), np.nan), where=n > 0)
    return np.asarray(means)


def _series(
    run: RunRecord, value: Callable[[dict[str, Any]], float]
) -> tuple[np.ndarray, np.ndarray]:
    before, values = 0, []
    for event in run.train:
        values.append(value(event | {"interval_tokens": event["tokens"] - before}))
        before = event["tokens"]
    return np.array([e["tokens"] for e in run.train], dtype=float), np.array(values, dtype=float)


def _losses(runs: list[RunRecord], unit: str, train_key: str, validation_key: str) -> list[Plot]:
    """Plot loss against tokens: of one run a line per domain, of several a plot per domain."""
    domains = sorted(
        {d for run in runs for e in (*run.train, *run.validation) for d in e["domains"]}
    )
    if len(runs) == 1:
        groups = [(f"Loss, {unit}", [(runs[0], domain, domain) for domain in domains])]
    else:
        groups = [
            (f"Loss on {domain}, {unit}", [(run, domain, run.label) for run in runs])
            for domain in domains
        ]
    plots = [_loss(title, unit, lines, train_key, validation_key) for title, lines in groups]
    return [plot for plot in plots if plot]


def _loss(
    title: str,
    unit: str,
    lines: list[tuple[RunRecord, str, str]],
    train_key: str,
    validation_key: str,
) -> Plot | None:
    """Plot training loss thin and validation loss thick, with markers.

    Args:
        title: Title.
        unit: Label of the axis.
        lines: Run, domain and name in the legend of each line.
        train_key: Metric of training events.
        validation_key: Metric of validation events.
    """
    figure, axes = _canvas()
    tops, parts = [], []
    for (run, domain, name), colour in zip(lines, itertools.cycle(COLOURS), strict=False):
        x, y = _series(run, partial(_domain_metric, domain=domain, key=train_key))
        if not np.isfinite(y).any():
            continue
        if len({line[0].label for line in lines}) == 1:
            axes.plot(*thin(x, y), color=colour, alpha=0.2, linewidth=0.8)
        axes.plot(
            *thin(x, running_mean(y)),
            color=colour,
            linewidth=1.1,
            marker="o" if len(x) == 1 else None,
            label=f"{name}, training",
        )
        curves = _validation_curves(run, domain, validation_key)
        for (weights, points), style in zip(
            curves.items(), itertools.cycle(LINE_STYLES), strict=False
        ):
            label = f"{name}, {weights}" if weights else name
            axes.plot(
                *zip(*points, strict=True),
                color=colour,
                linewidth=1.2 if weights else 2.2,
                linestyle=style,
                marker=None if weights and len(points) > 1 else "o",
                markersize=5,
                label=f"{label}, validation",
            )
            parts.append(f"{label} ends at {points[-1][1]:.3f} on the validation split")
        tops.append(
            np.nanmax(np.where((x >= WARM_UP_SHARE * x[-1]) & np.isfinite(y), y, -math.inf))
        )
        _mark_resumes(axes, run)
    if not tops:
        return None
    _frame(axes, [line[0] for line in lines], title, unit)
    if math.isfinite(top := max(tops)):
        bottom = axes.get_ylim()[0]
        axes.set_ylim(bottom, top + 0.05 * max(top - bottom, 1e-3))
    legend_below(axes)
    return finish(figure, title, f"{title} against tokens: " + "; ".join(parts))


def _validation_curves(run: RunRecord, domain: str, key: str) -> dict[str, list[tuple[int, float]]]:
    """Return (tokens, metric) by name of the weights: "" for those trained, then the averages."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for event in run.validation:
        for weights, metrics in {"": event, **event.get("averages", {})}.items():
            if domain in metrics["domains"]:
                curves.setdefault(weights, []).append(
                    (event["tokens"], metrics["domains"][domain][key])
                )
    return curves


def _domain_metric(event: dict[str, Any], domain: str, key: str) -> float:
    return float(event["domains"].get(domain, {}).get(key, math.nan))


def _update_ratio(event: dict[str, Any], kind: str) -> float:
    return float(event.get("update_ratios", {}).get(kind, math.nan))


def _quantity(
    runs: list[RunRecord],
    title: str,
    label: str,
    value: Callable[[dict[str, Any]], float],
    *,
    log: bool = False,
    from_zero: bool = False,
    unit: str | None = None,
    smooth: bool = True,
) -> Plot | None:
    """Plot one quantity of each logged step against tokens; `unit` is shown with SI prefixes."""
    figure, axes = _canvas()
    parts = []
    for number, run in enumerate(runs):
        x, y = _series(run, value)
        if not np.isfinite(y).any():
            continue
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(
            *thin(x, y),
            color=colour,
            linewidth=0.8 if smooth else 1.6,
            alpha=0.3 if smooth else 1.0,
            marker="o" if len(x) == 1 else None,
            label=None if smooth else run.label,
        )
        if smooth:
            axes.plot(*thin(x, running_mean(y)), color=colour, linewidth=1.6, label=run.label)
        parts.append(f"{run.label} from {np.nanmin(y):.3g} to {np.nanmax(y):.3g}")
        _mark_resumes(axes, run)
    if not parts:
        return None
    if log:
        axes.set_yscale("log")
    _frame(axes, runs, title, label)
    if from_zero:
        axes.set_ylim(bottom=0)
    if unit is not None:
        axes.yaxis.set_major_formatter(EngFormatter(unit=unit, sep=" " if unit else ""))
    if len(runs) > 1:
        legend_below(axes)
    return finish(figure, title, f"{title} against tokens: " + "; ".join(parts))


def _noise(runs: list[RunRecord]) -> Plot | None:
    """Plot the gradient noise scale: ratio of two wide running means (nextpt/train/dynamics.py)."""
    figure, axes = _canvas()
    parts = []
    for number, run in enumerate(runs):
        x, trace = _series(run, lambda e: (e.get("noise") or {}).get("trace", math.nan))
        _, square = _series(run, lambda e: (e.get("noise") or {}).get("square", math.nan))
        if not np.isfinite(trace).any():
            continue
        below = running_mean(square, NOISE_SHARE)
        scale = np.divide(
            running_mean(trace, NOISE_SHARE), below, out=np.full(len(x), np.nan), where=below > 0
        )
        axes.plot(*thin(x, scale), color=COLOURS[number % len(COLOURS)], label=run.label)
        batch = run.batch_tokens()
        axes.step(
            x,
            batch,
            where="post",
            color=COLOURS[number % len(COLOURS)],
            linestyle="--",
            linewidth=0.9,
        )
        if np.isfinite(scale).any():
            parts.append(
                f"{run.label} ends at {scale[np.isfinite(scale)][-1]:.3g} targets, its batch has"
                f" {batch[-1]:,}"
            )
        _mark_resumes(axes, run)
    if not parts:
        return None
    axes.set_yscale("log")
    _frame(axes, runs, "Gradient noise scale (dashed: the batch)", "targets")
    if len(runs) > 1:
        legend_below(axes)
    return finish(
        figure, "Gradient noise scale", "Gradient noise scale against tokens: " + "; ".join(parts)
    )


def _updates(runs: list[RunRecord]) -> Plot | None:
    """Plot the size of updates: of one run per kind of parameter, of several the feed-forward's."""
    kinds = sorted({kind for run in runs for e in run.train for kind in e.get("update_ratios", {})})
    lines = (
        [(runs[0], kind, kind.replace("_", "-")) for kind in kinds]
        if len(runs) == 1
        else [(run, "feed_forward", run.label) for run in runs]
    )
    figure, axes = _canvas()
    parts = []
    for (run, kind, name), colour in zip(lines, itertools.cycle(COLOURS), strict=False):
        x, y = _series(run, partial(_update_ratio, kind=kind))
        y = np.where(y > 0, y, np.nan)
        if np.isfinite(y).any():
            axes.plot(*thin(x, running_mean(y)), color=colour, label=name)
            parts.append(f"{name} from {np.nanmin(y):.2g} to {np.nanmax(y):.2g}")
    if not parts:
        return None
    axes.set_yscale("log")
    _frame(
        axes,
        runs,
        "Size of updates" if len(runs) == 1 else "Size of updates, feed-forward",
        "norm of the update / norm of the weights",
    )
    legend_below(axes)
    return finish(
        figure, "Size of updates", "Update divided by weights against tokens: " + "; ".join(parts)
    )


def _compressors(runs: list[RunRecord]) -> Plot | None:
    """Plot bits per byte of held-out documents beside compressors, all documents as one stream."""
    evaluations = {run.label: run.evaluation["domains"] for run in runs if run.evaluation}
    compared = next(
        (e for e in evaluations.values() if all("compressors" in f for f in e.values())), None
    )
    if compared is None:
        return None
    domains = list(compared)
    bars: list[tuple[str, list[float], str]] = [
        (
            label,
            [evaluation.get(d, {}).get("bpb", math.nan) for d in domains],
            COLOURS[i % len(COLOURS)],
        )
        for i, (label, evaluation) in enumerate(evaluations.items())
    ]
    greys = ("#bdbdbd", "#969696", "#636363")
    first = compared[domains[0]]["compressors"]
    for number, name in enumerate(sorted(first, key=lambda name: -first[name]["bpb_concatenated"])):
        values = [compared[d]["compressors"][name]["bpb_concatenated"] for d in domains]
        bars.append((name, values, greys[number % len(greys)]))
    figure, axes = _canvas()
    width = 0.8 / len(bars)
    for number, (name, values, colour) in enumerate(bars):
        positions = np.arange(len(domains)) + (number - (len(bars) - 1) / 2) * width
        drawn = axes.bar(positions, values, width * 0.92, color=colour, label=name)
        axes.bar_label(drawn, fmt="%.2f", fontsize=8, padding=2)
    axes.set_xticks(range(len(domains)), domains)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("bits per byte, lower is better")
    axes.set_title("Held-out documents beside compressors", loc="left", fontweight="bold")
    axes.legend(fontsize=8, ncols=min(len(bars), 4), loc="upper center", bbox_to_anchor=(0.5, -0.1))
    return finish(
        figure,
        "Held-out documents beside compressors",
        "Bits per byte: "
        + "; ".join(f"{name} " + ", ".join(f"{v:.3f}" for v in values) for name, values, _ in bars),
    )


def _canvas() -> tuple[Figure, Axes]:
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(6.4, 3.9), layout="constrained")
        return figure, figure.add_subplot()


def _frame(axes: Axes, runs: list[RunRecord], title: str, label: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel(label)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.set_xlim(0, max(run.last["tokens"] for run in runs) * 1.01)


def _mark_resumes(axes: Axes, run: RunRecord) -> None:
    """Mark every resume with a dotted line."""
    for start in run.starts[1:]:
        axes.axvline(
            run.batches.consumed_tokens(start["first_step"] - 1),
            color="#999999",
            linestyle=":",
            linewidth=0.9,
        )


def finish(figure: Figure, title: str, alt: str) -> Plot:
    """Render a figure as SVG; equal figures give equal bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return Plot(
        title, "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode(), alt
    )
