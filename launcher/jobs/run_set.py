"""Training of one run of a set: rung of a ladder, variant of an ablation, trial of a search."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from launcher.console import echo

if TYPE_CHECKING:
    from nextpt.scaling.run_set import NamedRun, RunSet


def train_run(runs: RunSet, run: NamedRun, position: str, ranks: int | None) -> None:
    """Train one run to its end; exits with the run's exit code where that is not 0.

    Args:
        runs: The set.
        run: The run of the set.
        position: Of the run in the set, such as "rung 2/7", to print.
        ranks: Processes; None is one per GPU, 1 without GPUs.
    """
    if code := start_run(runs, run, position, ranks):
        exit_with(code, run)


def start_run(runs: RunSet, run: NamedRun, position: str, ranks: int | None) -> int:
    """Train one run as `train_run` does; returns its exit code."""
    from launcher.jobs.local import start_training
    from launcher.jobs.supervise import RESTARTS, supervise
    from nextpt.model import ModelSpec, count

    config = runs.config(run)
    parameters = count(ModelSpec.from_config(config)).parameters
    echo(
        f"\n=== {position} {run.name}: {parameters:,} parameters, {config.total_tokens:,} tokens,"
        f" {runs.flops(run):.3g} FLOPs"
    )
    start = partial(start_training, str(runs.base), runs.arguments(run), ranks)
    return supervise(start, config.run_dir, RESTARTS)


def exit_with(code: int, run: NamedRun) -> NoReturn:
    """End the command with the exit code of a run that failed."""
    print(
        f"error: {run.name} ended with exit code {code}; see the message above. When that is"
        " fixed, the same command continues",
        file=sys.stderr,
        flush=True,
    )
    sys.exit(code)
