"""`nextpt scaling sweep`: train a ladder, predict its largest run, measure the error."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.console import echo
from launcher.jobs.run_set import train_run
from launcher.options import Ranks, SbatchOptions
from launcher.registration import add_command
from nextpt.base.errors import ScalingError

if TYPE_CHECKING:
    from nextpt.scaling.ladder import Ladder

ROOT = Path(__file__).resolve().parents[2]
# Slurm runs a copy of the script, which does not know its origin: all paths are absolute.
SCRIPT = """#!/usr/bin/env bash
# {title}
#SBATCH --job-name=nextpt-ladder
#SBATCH --ntasks=1
#SBATCH --requeue
{logs}
{options}set -euo pipefail
cd {folder}
export PYTHONPATH={root}
exec {python} -m launcher.cli scaling sweep {arguments}
"""

LadderFile = Annotated[
    Path,
    typer.Argument(
        metavar="LADDER.yaml", help="base config, rungs and target; see docs/scaling.md"
    ),
]
Rung = Annotated[
    int | None, typer.Option(min=0, help="train only the rung with this number, from 0")
]
WriteSlurm = Annotated[
    bool,
    typer.Option(
        "--slurm",
        help="write DIR/slurm/rungs.sbatch (an array) and target.sbatch, and train nothing",
    ),
]


def sweep(
    ladder_file: LadderFile,
    ranks: Ranks = None,
    rung: Rung = None,
    slurm: WriteSlurm = False,
    sbatch: SbatchOptions = None,
) -> None:
    """Train small runs, predict the loss of the largest, train it, and report the error.

    The prediction is written before the largest run starts. A finished run is not trained again:
    the same command continues after an interruption.
    """
    from nextpt.scaling.ladder import is_done, load_ladder

    ladder = load_ladder(ladder_file)
    if rung is not None and rung >= len(ladder.rungs):
        raise ScalingError(
            f"--rung {rung}: the ladder has {len(ladder.rungs)} rungs, 0 to {len(ladder.rungs) - 1}"
        )
    if slurm:
        _write_scripts(ladder_file, ladder, ranks, sbatch or [])
        return
    for number, run in enumerate(ladder.rungs):
        if rung in (None, number) and not is_done(ladder, run):
            train_run(ladder, run, f"rung {number + 1}/{len(ladder.rungs)}", ranks)
    if rung is None:
        _predict_and_measure(ladder, ranks)


def _predict_and_measure(ladder: Ladder, ranks: int | None) -> None:
    from nextpt.scaling.ladder import is_done, write_prediction, write_result

    prediction = write_prediction(ladder)
    low, high = prediction["interval"]
    echo(
        f"predicted {ladder.target.name} ({prediction['compute_ratio']:.1f} times the compute of"
        f" the largest fitted rung): {prediction['loss']:.4f} nats per token,"
        f" {prediction['level']:.0%} between {low:.4f} and {high:.4f}; written to"
        f" {ladder.dir / 'prediction.json'}"
    )
    for warning in prediction["warnings"]:
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
    ladder_file: Path, ladder: Ladder, ranks: int | None, sbatch_options: list[str]
) -> None:
    from launcher.jobs.slurm import log_folder, option_line, parse_sbatch_option
    from nextpt.base.files import atomic_write

    options = "".join(
        f"{option_line(name, value)}\n" for name, value in map(parse_sbatch_option, sbatch_options)
    )
    arguments = shlex.join(
        [str(ladder_file.resolve()), *(["--ranks", str(ranks)] if ranks else [])]
    )
    name_in_comment = " ".join(ladder_file.name.split())
    logs, scripts_folder = log_folder(ladder.dir), ladder.dir.resolve() / "slurm"
    scripts_folder.mkdir(parents=True, exist_ok=True)
    paths = {
        "folder": shlex.quote(str(Path.cwd())),
        "root": shlex.quote(str(ROOT)),
        "python": shlex.quote(sys.executable),
    }
    rungs = SCRIPT.format(
        title=f"The rungs of {name_in_comment}, one per task; finished ones exit at once.",
        logs=option_line("--output", f"{logs}/%A_%a.log"),
        options=f"#SBATCH --array=0-{len(ladder.rungs) - 1}\n{options}",
        arguments=f'{arguments} --rung "$SLURM_ARRAY_TASK_ID"',
        **paths,
    )
    target = SCRIPT.format(
        title=f"The prediction for {name_in_comment} and its target, after all rungs.",
        logs=option_line("--output", f"{logs}/%j.log"),
        options=options,
        arguments=arguments,
        **paths,
    )
    for name, text in (("rungs.sbatch", rungs), ("target.sbatch", target)):
        with atomic_write(scripts_folder / name) as file:
            file.write(text)
    echo(f"written to {scripts_folder}; nothing was submitted. Submit both:")
    rungs_script, target_script = (
        shlex.quote(str(scripts_folder / name)) for name in ("rungs.sbatch", "target.sbatch")
    )
    echo(
        f"  job=$(sbatch --parsable {rungs_script}) &&"
        f" sbatch --dependency=afterok:$job {target_script}"
    )


def register(app: typer.Typer) -> None:
    """Add the command to its group."""
    add_command(
        app, "sweep", sweep, example="nextpt scaling sweep configs/ladders/demo.yaml --ranks 2"
    )
