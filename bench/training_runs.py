"""Whole runs of `nextpt train` for benchmarks of recipes: train one if needed, read its loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launcher.jobs.run_set import exit_with, start_run
from nextpt.base.errors import UserError
from nextpt.scaling.run_set import NamedRun, RunSet


def train(config: Path, folder: Path, overrides: Sequence[str]) -> float:
    """Train a run on one rank, unless it is finished.

    Args:
        config: The config.
        folder: Run folder; its name becomes the run's.
        overrides: Keys of the config that the run changes.

    Returns:
        Held-out loss after the last step, nats per token; infinity where the run diverged.

    Raises:
        SystemExit: The training failed, or the folder holds a run of another config.
    """
    runs = RunSet(base=config, dir=folder.parent)
    run = NamedRun(name=folder.name, overrides=[*overrides])
    try:
        if (loss := runs.loss(run)) is None:
            code = start_run(runs, run, "run", ranks=1)
            loss = runs.loss(run)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    if loss is None:
        exit_with(code, run)
    return loss
