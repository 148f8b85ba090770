"""`nextpt tune`: learning rate and decay of a large run from trials of a small one."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.console import build_table, console, echo
from launcher.options import Overrides, Ranks
from launcher.registration import add_command

if TYPE_CHECKING:
    from nextpt.config import Config
    from nextpt.scaling.optimum import Optimum
    from nextpt.scaling.proxy import Transfer
    from nextpt.scaling.run_set import NamedRun
    from nextpt.scaling.tuning import Tuned

File = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file of the large run, see configs/")
]
Steps = Annotated[
    int | None,
    typer.Option(min=1, help="optimizer steps of a trial [default: 20 tokens per parameter]"),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1, help="sequences per step of a trial [default: the large run's, x (tokens)^0.383]"
    ),
]
Seeds = Annotated[int, typer.Option(min=1, help="trials of every value, with different seeds")]
HorizonExponent = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        help="h of lr ~ tokens^-h, for the length of the large run; 0: its length changes nothing",
    ),
]
SameShape = Annotated[
    bool, typer.Option("--same-shape", help="trials of the large model itself; needs --steps")
]
Dir = Annotated[
    Path | None,
    typer.Option("--dir", help="folder of the trials [default: RUN-tune, RUN the run's folder]"),
]
Output = Annotated[Path | None, typer.Option(help="config to write [default: DIR/tuned.yaml]")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="print the proxy and the cost, and train nothing")
]


def tune(
    file: File,
    overrides: Overrides = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    seeds: Seeds = 2,
    horizon_exponent: HorizonExponent = 0.32,
    same_shape: SameShape = False,
    ranks: Ranks = None,
    folder: Dir = None,
    output: Output = None,
    dry_run: DryRun = False,
) -> None:
    """Find learning rate and decay on a small proxy, and write the config of the large run.

    The proxy has the base shape of the config's parametrization (muP, CompleteP). DIR/tune.json has
    the trials, the best values with their intervals, and the cost, DIR/tune.png the plot. A
    finished trial is not trained again: the same command continues after an interruption.
    """
    from launcher.jobs.local import default_ranks
    from nextpt.config import load_config
    from nextpt.data.epochs import count_epoch
    from nextpt.scaling.proxy import plan_proxy, transfer
    from nextpt.scaling.record import write_json
    from nextpt.scaling.tuned_config import check_output, write_config
    from nextpt.scaling.tuning import create_tuning, run_search
    from nextpt.scaling.tuning_plot import plot_tuning

    large = count_epoch(load_config(file, overrides or []))
    folder = folder or large.run_dir.with_name(f"{large.run_dir.name}-tune")
    target = output or folder / "tuned.yaml"
    check_output(target, file, folder)
    proxy = plan_proxy(
        large,
        ranks=ranks or default_ranks(),
        steps=steps,
        batch_size=batch_size,
        same_shape=same_shape,
        horizon_exponent=horizon_exponent,
    )
    factors = transfer(proxy, large, horizon_exponent)
    _print_plan(proxy, large, factors, seeds)
    if dry_run:
        return
    tuning = create_tuning(proxy, folder, seeds)

    def train(trial: NamedRun, number: int) -> None:
        from launcher.jobs.run_set import exit_with, start_run

        if code := start_run(tuning, trial, f"trial {number}", ranks):
            if not tuning.has_diverged(trial):
                exit_with(code, trial)
            echo(f"{trial.name} diverged; it counts as worse than all others")

    tuned = run_search(tuning, large, factors, train)
    _print_result(tuned)
    command = shlex.join(["nextpt", *sys.argv[1:]])
    write_json({"command": command, **tuned.to_json()}, folder / "tune.json")
    plot_tuning(tuned, f"{large.run.name}: trials of a proxy", folder / "tune.png")
    write_config(tuned, file, overrides or [], command, target)
    echo(f"written to {target}; all trials in {folder / 'tune.json'}, plotted in tune.png there")


def _print_plan(proxy: Config, large: Config, factors: Transfer, seeds: int) -> None:
    """Print the proxy beside the large run, what the trials cost, and the rules of the transfer."""
    from nextpt.scaling.optimum import GRID, LARGEST_EXPONENT
    from nextpt.scaling.proxy import parameters_of
    from nextpt.scaling.run_set import training_flops
    from nextpt.scaling.tuned_config import format_share
    from nextpt.scaling.tuning import decay_key

    rows = [
        [
            name,
            f"{config.model.width:,}",
            f"{config.model.depth:,}",
            f"{parameters_of(config):,}",
            f"{config.total_steps:,}",
            f"{config.train.global_batch_size:,}",
            f"{config.total_tokens:,}",
            f"{training_flops(config):.3g}",
        ]
        for name, config in (("proxy", proxy), ("large run", large))
    ]
    headings = ["", "width", "depth", "parameters", "steps", "batch", "tokens", "FLOPs"]
    console.print(build_table(f"{large.run.name}: proxy and large run", headings, rows))
    searches = 2 if decay_key(large) else 1
    least, most = (
        searches * seeds * values for values in (len(GRID), len(GRID) + LARGEST_EXPONENT - GRID[-1])
    )
    flops, whole = training_flops(proxy), training_flops(large)
    echo(
        f"{least} trials: {least * proxy.total_tokens:,} tokens, {least * flops:.3g} FLOPs,"
        f" {format_share(least * flops / whole)} of the large run; at most {most},"
        f" {format_share(most * flops / whole)}, where the best value is at an edge of the grid"
    )
    echo(
        f"from proxy to large run: learning rate x {factors.lr:.3g} ({factors.lr_for_tokens:.3g}"
        f" for {factors.tokens:.4g} times the tokens, {factors.lr_for_batch:.3g} for"
        f" {factors.batch:g} times the batch), weight decay x {factors.weight_decay:.3g}; over the"
        f" shape by model.parametrization = {large.model.parametrization}"
    )


def _print_result(tuned: Tuned) -> None:
    from nextpt.scaling.tuned_config import format_optimum, format_share

    for key, optimum in tuned.optima.items():
        _print_points(key, optimum, tuned)
        echo(f"best {key} of the proxy: {format_optimum(optimum)}")
    for note in tuned.notes:
        echo(f"note: {note}")
    cost = tuned.cost
    echo(
        f"\n{cost['trials']} trials, {cost['diverged']} of them diverged: {cost['tokens']:,}"
        f" tokens, {cost['flops']:.3g} FLOPs, {format_share(cost['share'])} of the large run"
    )
    for key, optimum in tuned.optima.items():
        echo(f"{key} of the large run: {format_optimum(optimum, tuned.factor(key))}")


def _print_points(key: str, optimum: Optimum, tuned: Tuned) -> None:
    """Print the losses of a search by value and seed."""
    lowest = min(point.mean for point in optimum.points)
    several = len(tuned.seeds) > 1
    rows = [
        [
            f"{point.value:g}",
            *(_format_loss(loss) for loss in point.losses),
            *([_format_loss(point.mean)] if several else []),
            f"{point.mean - lowest:+.4f}" if math.isfinite(point.mean) else "",
        ]
        for point in optimum.points
    ]
    headings = [key, *(f"seed {seed}" for seed in tuned.seeds), *(["mean"] if several else [])]
    title = "validation loss of the proxy, nats per token"
    console.print(build_table(title, [*headings, "above the lowest"], rows))


def _format_loss(loss: float) -> str:
    return f"{loss:.4f}" if math.isfinite(loss) else "diverged"


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    add_command(
        app,
        "tune",
        tune,
        example=(
            "nextpt tune configs/1.3b.yaml model.parametrization=mup model.base_width=256 --dry-run"
        ),
    )
