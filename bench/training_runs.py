"""Whole runs of `nextpt train` for benchmarks of recipes: train one if needed, read its loss."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from nextpt.config import load_config
from nextpt.events import read_events


def train(config: Path, folder: Path, overrides: Sequence[str]) -> float:
    """Train a run on one rank, unless it is finished.

    Args:
        config: The config.
        folder: Run folder; its name becomes the run's.
        overrides: Keys of the config that the run changes.

    Returns:
        Held-out loss after the last step, nats per token; infinity where the run diverged.
    """
    overrides = [*overrides, f"run.name={folder.name}", f"run.dir={folder}"]
    last = load_config(config, overrides).total_steps
    if (loss := _final_loss(folder, last)) is None:
        command = [sys.executable, "-m", "launcher.cli", "train", "--config", str(config)]
        end = subprocess.run(
            [*command, "--ranks", "1", *overrides], capture_output=True, text=True, check=False
        )
        loss = _final_loss(folder, last)
        if loss is None and "diverged" not in end.stdout + end.stderr:
            raise SystemExit(f"{folder}: {end.stdout[-2000:]}{end.stderr[-2000:]}")
    return math.inf if loss is None or math.isnan(loss) else loss


def _final_loss(folder: Path, step: int) -> float | None:
    events = read_events(folder / "metrics.jsonl", "validation") if folder.is_dir() else []
    losses = [float(event["total"]["nats_per_token"]) for event in events if event["step"] == step]
    return losses[-1] if losses else None
