"""Training one run of a set: a rung of a ladder, a variant of an ablation."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from launcher.console import echo

if TYPE_CHECKING:
    from nextpt.scaling.run_set import NamedRun, RunSet


def train_run(runs: RunSet, run: NamedRun, place: str, ranks: int | None) -> None:
    """One run, to its end.

    Ends the command with the run's exit code where it has another than 0. place: of it in the set,
    to say.
    """
    from launcher.jobs.local import start_training
    from launcher.jobs.supervise import RESTARTS, supervise
    from nextpt.model import ModelSpec, count

    config = runs.config(run)
    echo(
        f"\n=== {place} {run.name}: {count(ModelSpec.from_config(config)).parameters:,} parameters,"
        f" {config.total_steps * config.tokens_per_step:,} tokens, {runs.flops(run):.3g} FLOPs"
    )
    code = supervise(
        lambda: start_training(str(runs.base), runs.arguments(run), ranks), config.run_dir, RESTARTS
    )
    if code:
        print(
            f"error: {run.name} ended with exit code {code}; the message is above. When that is"
            " mended, the same command goes on",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(code)
