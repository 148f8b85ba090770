"""Steps that Muon needs for AdamW's final loss, both tuned by the same number of trials.

    python -m bench.optimizer_steps CONFIG [--rates 2e-3,4e-3,8e-3,16e-3,32e-3] [KEY=VALUE ...]
        [--seeds 0,1,2] [--shares 0.4,0.5,0.6,0.7] [--dir runs/optimizer-steps] [--json FILE]

CONFIG is a run with Muon and a wsd schedule. Each optimizer is trained at every rate with the first
seed; its best rate is taken for all that follows. AdamW is then trained with every seed, and Muon
with every seed for each share of the steps, with warm-up and decay in proportion. Steps for AdamW's
loss of the same seed are interpolated: the loss as a line over the logarithm of steps. A finished
run is not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

from bench.training_runs import train
from kernels.bench.machine import describe_machine
from nextpt.config import Config, load_config

KINDS = ("adamw", "muon")


class Runs:
    """Trains the runs of one config.

    Args:
        path: The config.
        overrides: Keys that all runs change.
        folder: Of the run folders.
    """

    def __init__(self, path: Path, overrides: Sequence[str], folder: Path) -> None:
        self.path, self.overrides, self.folder = path, overrides, folder
        self.config: Config = load_config(path, overrides)

    def loss(self, kind: str, rate: str, seed: str, share: float = 1.0) -> float:
        """Held-out loss, nats per token, of a run over a share of the config's steps."""
        steps, schedule = self.steps(share), self.config.schedule
        loss = train(
            self.path,
            self.folder / f"{kind}-lr-{rate}-steps-{steps}-seed-{seed}",
            [
                *self.overrides,
                f"optimizer.kind={kind}",
                f"optimizer.lr={rate}",
                f"run.seed={seed}",
                f"train.steps={steps}",
                f"schedule.warmup={round(share * schedule.warmup)}",
                f"schedule.decay={round(share * (schedule.decay or 0))}",
                f"checkpoint.every_steps={steps}",
                f"validation.every_steps={steps}",
            ],
        )
        print(f"{kind} at {rate}, seed {seed}, {steps:,} steps: {loss:.4f} nats", flush=True)
        return loss

    def steps(self, share: float) -> int:
        """Steps of a run over a share of the config's."""
        return round(share * self.config.total_steps)


def steps_for(loss: float, steps: Sequence[int], losses: Sequence[float]) -> float:
    """Interpolate the steps that give a loss; NaN outside of what was trained.

    Args:
        loss: Nats per token.
        steps: Steps of runs, ascending.
        losses: Their losses, nats per token.
    """
    logs = np.interp(-loss, -np.array(losses), np.log(steps), left=math.nan, right=math.nan)
    return float(np.exp(logs))


def summarize(ratios: Sequence[float]) -> dict[str, float]:
    """Geometric mean of ratios, and its 95 % interval by Student's t over the logarithms."""
    logs = [math.log(ratio) for ratio in ratios]
    centre = statistics.mean(logs)
    result = {"ratio": math.exp(centre)}
    if len(logs) > 1:
        width = stats.t.ppf(0.975, len(logs) - 1) * stats.sem(logs)
        result |= {"low": math.exp(centre - width), "high": math.exp(centre + width)}
    return result


def measure(runs: Runs, rates: list[str], seeds: list[str], shares: list[float]) -> dict[str, Any]:
    """Train everything and return the losses and ratios."""
    trials = {kind: {rate: runs.loss(kind, rate, seeds[0]) for rate in rates} for kind in KINDS}
    best = {kind: min(losses, key=losses.__getitem__) for kind, losses in trials.items()}
    steps = [runs.steps(share) for share in shares]
    rows = []
    for seed in seeds:
        target = runs.loss("adamw", best["adamw"], seed)
        losses = [runs.loss("muon", best["muon"], seed, share) for share in shares]
        needed = steps_for(target, steps, losses)
        if math.isnan(needed):
            raise SystemExit(
                f"error: seed {seed}: AdamW's {target:.4f} is not among Muon's losses"
                f" {', '.join(f'{loss:.4f}' for loss in losses)}; give other --shares"
            )
        rows.append({"seed": seed, "adamw": target, "muon": losses, "steps": needed})
    ratios = [runs.config.total_steps / row["steps"] for row in rows]
    return {
        "steps": runs.config.total_steps,
        "trials": trials,
        "best": best,
        "muon_steps": steps,
        "seeds": rows,
        **summarize(ratios),
    }


def show(result: dict[str, Any]) -> None:
    """Print the trials, the steps of each seed, and the ratio."""
    console = Console()
    trials = Table("optimizer", *next(iter(result["trials"].values())))
    for kind, losses in result["trials"].items():
        trials.add_row(kind, *(f"{loss:.3f}" for loss in losses.values()))
    console.print(trials)
    table = Table("seed", f"AdamW, {result['steps']:,}", *map(str, result["muon_steps"]), "steps")
    for row in result["seeds"]:
        cells = [f"{loss:.3f}" for loss in (row["adamw"], *row["muon"])]
        table.add_row(str(row["seed"]), *cells, f"{row['steps']:.0f}")
    console.print(table)
    interval = f" (95 %: {result['low']:.2f} to {result['high']:.2f})" if "low" in result else ""
    console.print(f"AdamW needs {result['ratio']:.2f} times the steps of Muon{interval}")


def main() -> None:
    """Measure, print, and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="keys of the config, key.sub=value")
    parser.add_argument("--rates", default="2e-3,4e-3,8e-3,16e-3,32e-3")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--shares", default="0.4,0.5,0.6,0.7", help="Muon's steps, of the config's")
    parser.add_argument("--dir", type=Path, default=Path("runs/optimizer-steps"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_intermixed_args()
    runs = Runs(arguments.config, arguments.overrides, arguments.dir)
    shares = [float(share) for share in arguments.shares.split(",")]
    result = measure(runs, arguments.rates.split(","), arguments.seeds.split(","), shares)
    show(result)
    if arguments.json:
        content = {"machine": describe_machine("cpu")} | result
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
