"""Pictures of runs: matplotlib to SVG, each a data URI, so that a page needs no network and no other file."""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from nextpt.observe.run_record import RunRecord

# Okabe and Ito's palette: told apart with every common colour blindness, and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MOST_POINTS = 1500  # of a line; more are thinned, keeping the extremes of every stretch
NOISE_SHARE = 0.2  # of the run, that the noise scale is a mean over
# Of the run, above which losses may leave the frame: the first steps would flatten all others
WARM_UP_SHARE = 0.05
SETTINGS = {
    "svg.hashsalt": "nextpt",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Picture:
    """One figure: uri for <img src>, alt for those who do not see it."""

    title: str
    uri: str
    alt: str

    @property
    def svg(self) -> bytes:
        return base64.b64decode(self.uri.partition(",")[2])


def pictures(runs: list[RunRecord]) -> list[Picture]:
    """All pictures of a report, in reading order; those without data are left out."""
    drawn = [
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
        _quantity(runs, "Waiting for data", "share of the time, %", _waiting, from_zero=True),
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
            "Model FLOP utilisation",
            "share of the peak, %",
            lambda e: math.nan if e.get("mfu") is None else 100 * e["mfu"],
            from_zero=True,
        ),
    ]
    return [picture for picture in drawn if picture]


def _waiting(event: dict[str, Any]) -> float:
    """Percent of the logged interval that rank 0 waited for its loader.

    `interval_tokens` is put there by _series.
    """
    seconds = event["interval_tokens"] / event["tokens_per_second"]
    return 100 * event["data_wait_seconds"] / seconds if seconds else math.nan


def thin(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most about `most` points of a line: the smallest and largest of each stretch, so that no spike is lost."""
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
    """Mean over a centred window of `share` of the line (at least 5 points).

    What is not finite is left out.
    """
    half = max(int(len(y) * share / 2), 2)
    finite = np.isfinite(y)
    sums = np.concatenate(([0.0], np.cumsum(np.where(finite, y, 0.0))))
    counts = np.concatenate(([0], np.cumsum(finite)))
    low = np.maximum(np.arange(len(y)) - half, 0)
    high = np.minimum(np.arange(len(y)) + half + 1, len(y))
    n = counts[high] - counts[low]
    return np.divide(sums[high] - sums[low], n, out=np.full(len(y), np.nan), where=n > 0)


def _series(
    run: RunRecord, value: Callable[[dict[str, Any]], float]
) -> tuple[np.ndarray, np.ndarray]:
    before, values = 0, []
    for event in run.train:
        values.append(value(event | {"interval_tokens": event["tokens"] - before}))
        before = event["tokens"]
    return np.array([e["tokens"] for e in run.train], dtype=float), np.array(values, dtype=float)


def _losses(runs: list[RunRecord], unit: str, train_key: str, heldout_key: str) -> list[Picture]:
    """Loss against tokens.

    One run: one picture with a line per domain. Several: one picture per domain, a line per run.
    """
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
    drawn = [_loss(title, unit, lines, train_key, heldout_key) for title, lines in groups]
    return [picture for picture in drawn if picture]


def _loss(
    title: str, unit: str, lines: list[tuple[RunRecord, str, str]], train_key: str, heldout_key: str
) -> Picture | None:
    """Training thin, held-out rows thick with marks. lines: (run, domain, name in the legend)."""
    figure, axes = _canvas()
    tops, parts = [], []
    for (run, domain, name), colour in zip(lines, itertools.cycle(COLOURS), strict=False):
        x, y = _series(run, lambda e, d=domain: e["domains"].get(d, {}).get(train_key, math.nan))
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
        if held := [
            (e["tokens"], e["domains"][domain][heldout_key])
            for e in run.validation
            if domain in e["domains"]
        ]:
            axes.plot(
                *zip(*held, strict=True),
                color=colour,
                linewidth=2.2,
                marker="o",
                markersize=5,
                label=f"{name}, held out",
            )
            parts.append(f"{name} ends at {held[-1][1]:.3f} on held-out rows")
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
    axes.legend(fontsize=8, ncols=1 if len(lines) < 4 else 2)
    return finish(figure, title, f"{title} against tokens: " + "; ".join(parts))


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
) -> Picture | None:
    """One number of each logged step against tokens. unit: shown with SI prefixes where given."""
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
        axes.legend(fontsize=8)
    return finish(figure, title, f"{title} against tokens: " + "; ".join(parts))


def _noise(runs: list[RunRecord]) -> Picture | None:
    """Gradient noise scale: the ratio of two running means (nextpt/train/dynamics.py), wide, as one step says little."""
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
        axes.axhline(
            run.config.tokens_per_step,
            color=COLOURS[number % len(COLOURS)],
            linestyle="--",
            linewidth=0.9,
        )
        if np.isfinite(scale).any():
            parts.append(
                f"{run.label} ends at {scale[np.isfinite(scale)][-1]:.3g} targets, its batch has"
                f" {run.config.tokens_per_step:,}"
            )
        _mark_resumes(axes, run)
    if not parts:
        return None
    axes.set_yscale("log")
    _frame(axes, runs, "Gradient noise scale (dashed: the batch)", "targets")
    if len(runs) > 1:
        axes.legend(fontsize=8)
    return finish(
        figure, "Gradient noise scale", "Gradient noise scale against tokens: " + "; ".join(parts)
    )


def _updates(runs: list[RunRecord]) -> Picture | None:
    """Size of updates: of one run a line per kind of parameter, of several the feed-forward's."""
    kinds = sorted({kind for run in runs for e in run.train for kind in e.get("update_ratios", {})})
    lines = (
        [(runs[0], kind, kind.replace("_", "-")) for kind in kinds]
        if len(runs) == 1
        else [(run, "feed_forward", run.label) for run in runs]
    )
    figure, axes = _canvas()
    parts = []
    for (run, kind, name), colour in zip(lines, itertools.cycle(COLOURS), strict=False):
        x, y = _series(run, lambda e, k=kind: e.get("update_ratios", {}).get(k, math.nan))
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
    axes.legend(fontsize=8)
    return finish(
        figure, "Size of updates", "Update divided by weights against tokens: " + "; ".join(parts)
    )


def _compressors(runs: list[RunRecord]) -> Picture | None:
    """Bits per byte of held-out documents beside the compressors', all documents as one stream."""
    measured = [run for run in runs if run.evaluation]
    compared = next(
        (r for r in measured if all("compressors" in f for f in r.evaluation["domains"].values())),
        None,
    )
    if compared is None:
        return None
    domains = list(compared.evaluation["domains"])
    bars: list[tuple[str, list[float], str]] = [
        (
            run.label,
            [run.evaluation["domains"].get(d, {}).get("bpb", math.nan) for d in domains],
            COLOURS[i % len(COLOURS)],
        )
        for i, run in enumerate(measured)
    ]
    greys = ("#bdbdbd", "#969696", "#636363")
    first = compared.evaluation["domains"][domains[0]]["compressors"]
    for number, name in enumerate(sorted(first, key=lambda name: -first[name]["bpb_concatenated"])):
        values = [
            compared.evaluation["domains"][d]["compressors"][name]["bpb_concatenated"]
            for d in domains
        ]
        bars.append((name, values, greys[number % len(greys)]))
    figure, axes = _canvas()
    width = 0.8 / len(bars)
    for number, (name, values, colour) in enumerate(bars):
        places = np.arange(len(domains)) + (number - (len(bars) - 1) / 2) * width
        drawn = axes.bar(places, values, width * 0.92, color=colour, label=name)
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
    """A dotted line where a later start went on."""
    for start in run.starts[1:]:
        axes.axvline(
            (start["first_step"] - 1) * run.config.tokens_per_step,
            color="#999999",
            linestyle=":",
            linewidth=0.9,
        )


def finish(figure: Figure, title: str, alt: str) -> Picture:
    """As SVG, the same bytes each time."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return Picture(
        title, "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode(), alt
    )
