"""Held-out loss against learning rate, over widths or depths, by parametrization.

    python -m bench.lr_transfer CONFIG --axis width --sizes 32,64,128,256 [KEY=VALUE ...]
        [--parametrizations standard,mup] [--rates 1e-3,2e-3,...] [--seeds 0,1,...]
        [--dir runs/lr-transfer] [--json FILE] [--plot FILE]

Trains CONFIG for each parametrization, size, rate and seed, with the first size as the base shape,
at which every parametrization is the standard one, and shows at which rate each size has its lowest
mean loss. Where hyperparameters transfer that rate is the same at all sizes, or the one beside it.
Heads have the width of the config's; wider models have more of them. A finished run is not trained
again, so rates and seeds may be added.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from bench.training_runs import train
from kernels.bench.machine import describe_machine
from nextpt.base.plots import SETTINGS, save_plot, set_title
from nextpt.config import Config, load_config

RATES = "1e-3,2e-3,4e-3,8e-3,16e-3,32e-3"


@dataclass(frozen=True)
class Point:
    """Runs that differ in their seeds alone.

    Attributes:
        parametrization: `model.parametrization`.
        size: Width or depth of the model.
        lr: Its `optimizer.lr`.
        losses: Held-out loss of each seed after the last step, nats per token; infinity for a run
            that diverged.
    """

    parametrization: str
    size: int
    lr: float
    losses: tuple[float, ...]

    @property
    def loss(self) -> float:
        """Mean over the seeds."""
        return sum(self.losses) / len(self.losses)


def shape(config: Config, axis: str, size: int, base: int) -> list[str]:
    """Return the overrides that give a model one of the sizes."""
    model = config.model
    if axis == "depth":
        return [f"model.depth={size}", f"model.base_depth={base}"]
    head_dim = model.width // model.heads
    return [f"model.width={size}", f"model.heads={size // head_dim}", f"model.base_width={base}"]


def draw(points: Sequence[Point], axis: str, title: str, path: Path) -> None:
    """Write a plot with one panel for each parametrization."""
    kinds = list(dict.fromkeys(point.parametrization for point in points))
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(4.6 * len(kinds) + 0.8, 3.8), layout="constrained")
        panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        for kind, axes in zip(kinds, panels, strict=True):
            _draw_panel(axes, [p for p in points if p.parametrization == kind], axis)
            axes.set_title(kind, loc="left")
        panels[0].set_ylabel("held-out loss, nats per token")
        losses = [point.loss for point in points if point.loss < math.inf]
        panels[0].set_ylim(min(losses) - 0.03, min(max(losses) + 0.03, min(losses) + 0.75))
        panels[-1].legend(title=axis, loc="center left", bbox_to_anchor=(1, 0.5))
        set_title(figure, title)
        save_plot(figure, path)


def _draw_panel(axes: Axes, points: Sequence[Point], axis: str) -> None:
    sizes = sorted({point.size for point in points})
    colours = matplotlib.colormaps["viridis"]
    for number, size in enumerate(sizes):
        trained = [p for p in points if p.size == size and p.loss < math.inf]
        line = sorted((p.lr, p.loss) for p in trained)
        colour = colours(number / max(len(sizes) - 1, 1) * 0.9)
        single = [(p.lr, loss) for p in trained for loss in p.losses if len(p.losses) > 1]
        if single:
            axes.plot(*zip(*single, strict=True), ".", markersize=3, color=colour, alpha=0.5)
        axes.plot(*zip(*line, strict=True), "o-", markersize=4, color=colour, label=str(size))
        axes.plot(*min(line, key=lambda pair: pair[1]), "o", markersize=10, mfc="none", mec=colour)
    axes.set(xscale="log", xlabel="learning rate (optimizer.lr)")


def show(points: Sequence[Point], axis: str) -> None:
    """Print a table of the losses, the lowest of each row marked."""
    rates = sorted({point.lr for point in points})
    table = Table("parametrization", axis, *(f"{rate:g}" for rate in rates))
    for kind, size in dict.fromkeys((p.parametrization, p.size) for p in points):
        losses = {p.lr: p.loss for p in points if (p.parametrization, p.size) == (kind, size)}
        lowest = min(losses.values())
        cells = [f"{losses[r]:.3f}{'*' if losses[r] == lowest else ' '}" for r in rates]
        table.add_row(kind, str(size), *cells)
    Console().print(table)


def main() -> None:
    """Train what is missing, print the table, and write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="keys of the config, key.sub=value")
    parser.add_argument("--axis", choices=("width", "depth"), required=True)
    parser.add_argument("--sizes", required=True, help="comma-separated, the base shape first")
    parser.add_argument("--rates", default=RATES, help=f"learning rates [default: {RATES}]")
    parser.add_argument("--parametrizations", default="standard,mup")
    parser.add_argument("--seeds", help="comma-separated [default: the config's]")
    parser.add_argument("--dir", type=Path, default=Path("runs/lr-transfer"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    sizes = [int(size) for size in arguments.sizes.split(",")]
    own = str(config.run.seed)
    seeds = arguments.seeds.split(",") if arguments.seeds else [own]

    def run(kind: str, size: int, rate: str, seed: str) -> float:
        kind = "standard" if size == sizes[0] else kind  # the same bits
        name = f"{kind}-{arguments.axis}-{size}-lr-{rate}" + f"-seed-{seed}" * (seed != own)
        keys = [
            *arguments.overrides,
            f"model.parametrization={kind}",
            *shape(config, arguments.axis, size, sizes[0]),
            f"optimizer.lr={rate}",
            f"run.seed={seed}",
        ]
        loss = train(arguments.config, arguments.dir / name, keys)
        print(f"{name}: {loss:.4f} nats", flush=True)
        return loss

    points = [
        Point(kind, size, float(rate), tuple(run(kind, size, rate, seed) for seed in seeds))
        for kind in arguments.parametrizations.split(",")
        for size in sizes
        for rate in arguments.rates.split(",")
    ]
    show(points, arguments.axis)
    if arguments.json:
        content = {
            "machine": describe_machine("cpu"),
            "config": str(arguments.config),
            "overrides": arguments.overrides,
            "runs": [asdict(point) for point in points],
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    if arguments.plot:
        name = {"adamw": "AdamW", "muon": "Muon"}[config.optimizer.kind]
        title = f"Held-out loss after {config.total_steps:,} steps, {name}"
        draw(points, arguments.axis, title, arguments.plot)


if __name__ == "__main__":
    main()
