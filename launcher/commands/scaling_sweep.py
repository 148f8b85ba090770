"""`nextpt scaling sweep`: train a ladder's rungs, predict the largest, train it, and say how far off the prediction was."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from launcher.console import echo
from launcher.jobs.run_set import train_run
from launcher.registration import add_command
from nextpt.base.errors import ScalingError
from nextpt.base.files import atomic_write

ROOT = Path(__file__).resolve().parents[2]
# Slurm's own copy of the script does not know where it came from: everything is absolute.
SCRIPT = """#!/usr/bin/env bash
# {what}
#SBATCH --job-name=nextpt-ladder
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --output={logs}
{options}set -euo pipefail
cd {here}
export PYTHONPATH={root}
exec {python} -m launcher.cli scaling sweep {arguments}
"""


def sweep(
    ladder_file: Annotated[
        Path,
        typer.Argument(
            metavar="LADDER.yaml", help="base config, rungs and target; see docs/scaling.md"
        ),
    ],
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="processes of each run; one per GPU, or 1 without, unless given"),
    ] = None,
    rung: Annotated[
        int | None, typer.Option(min=0, help="train only the rung of this number, from 0, and end")
    ] = None,
    slurm: Annotated[
        bool,
        typer.Option(
            "--slurm",
            help="write DIR/slurm/rungs.sbatch (an array) and target.sbatch, train nothing",
        ),
    ] = False,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(
            help="with --slurm: a further option for sbatch, such as --gpus=8; may be repeated"
        ),
    ] = None,
) -> None:
    """Train a ladder of small runs, write the prediction of the largest to disk, train that, and report the error.

    What is finished is not trained again: the same command goes on after an interruption.
    """
    from nextpt.scaling.ladder import is_done, load_ladder, write_prediction, write_result

    ladder = load_ladder(ladder_file)
    if rung is not None and rung >= len(ladder.rungs):
        raise ScalingError(
            f"--rung {rung}: the ladder has {len(ladder.rungs)} rungs, 0 to {len(ladder.rungs) - 1}"
        )
    if slurm:
        _write_scripts(ladder_file, ladder.dir, len(ladder.rungs), ranks, sbatch or [])
        return
    for number, one in enumerate(ladder.rungs):
        if rung in (None, number) and not is_done(ladder, one):
            train_run(ladder, one, f"rung {number + 1}/{len(ladder.rungs)}", ranks)
    if rung is not None:
        return
    made = write_prediction(ladder)
    low, high = made["interval"]
    echo(
        f"predicted {ladder.target.name} ({made['compute_ratio']:.1f} times the compute of the"
        f" biggest fitted rung): {made['loss']:.4f} nats per token, {made['level']:.0%} between"
        f" {low:.4f} and {high:.4f}; written to {ladder.dir / 'prediction.json'}"
    )
    for warning in made["warnings"]:
        echo(f"warning: {warning}")
    if not is_done(ladder, ladder.target):
        train_run(ladder, ladder.target, "target", ranks)
    result = write_result(ladder)
    echo(
        f"measured {result['measured']:.4f}: the prediction is off by {result['error']:+.2%},"
        f" {'inside' if result['inside'] else 'OUTSIDE'} its interval; written to"
        f" {ladder.dir / 'result.json'}"
    )


def _write_scripts(
    ladder_file: Path, folder: Path, rungs: int, ranks: int | None, further: list[str]
) -> None:
    from launcher.jobs.slurm import further_option

    options = "".join(f"#SBATCH {name}={value}\n" for name, value in map(further_option, further))
    shared = [str(ladder_file.resolve()), *(["--ranks", str(ranks)] if ranks else [])]
    place = folder.resolve() / "slurm"
    place.mkdir(parents=True, exist_ok=True)
    common = {
        "here": shlex.quote(str(Path.cwd())),
        "root": shlex.quote(str(ROOT)),
        "python": shlex.quote(sys.executable),
    }
    scripts = {
        "rungs.sbatch": SCRIPT.format(
            what=(
                f"The rungs of {ladder_file.name}, one a task; those that are finished end at once."
            ),
            logs=place / "%A_%a.log",
            options=f"#SBATCH --array=0-{rungs - 1}\n{options}",
            arguments=shlex.join(shared) + ' --rung "$SLURM_ARRAY_TASK_ID"',
            **common,
        ),
        "target.sbatch": SCRIPT.format(
            what=f"The prediction of {ladder_file.name}'s target, and the target, after all rungs.",
            logs=place / "%j.log",
            options=options,
            arguments=shlex.join(shared),
            **common,
        ),
    }
    for name, text in scripts.items():
        with atomic_write(place / name) as file:
            file.write(text)
    echo(f"written to {place}; nothing was submitted. Submit both:")
    echo(
        f"  job=$(sbatch --parsable {place / 'rungs.sbatch'}) && sbatch --dependency=afterok:$job"
        f" {place / 'target.sbatch'}"
    )


def register(app: typer.Typer) -> None:
    """Add the command to its group."""
    add_command(
        app, "sweep", sweep, example="nextpt scaling sweep configs/ladders/demo.yaml --ranks 2"
    )
