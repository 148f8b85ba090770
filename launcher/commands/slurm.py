"""`nextpt slurm`: write a job script for a config and submit it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.console import echo
from launcher.jobs.slurm import further_option, job_script, submit_script
from launcher.registration import add_command, add_group
from nextpt.base.errors import ConfigError
from nextpt.base.files import atomic_write
from nextpt.config import Config, load_config

# Seconds from the signal to the time limit, as Slurm may send it up to 60 s too early or late
# (sbatch --signal)
LEAST_LEAD = 120


def submit(
    config: Annotated[Path, typer.Option(help="YAML file, see configs/")],
    nodes: Annotated[int, typer.Option(min=1)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="override keys of the file")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="one rank each; 0 trains on CPUs")] = 8,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="where there are no GPUs: 1 unless given")
    ] = None,
    cpus_per_rank: Annotated[int, typer.Option(min=1)] = 8,
    time: Annotated[
        str,
        typer.Option(
            help="time limit, as sbatch takes it; the job saves and queues itself again before it"
        ),
    ] = "24:00:00",
    sbatch: Annotated[
        list[str] | None,
        typer.Option(help="a further option for sbatch, such as --partition=gpu; may be repeated"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="write the script and show it, submit nothing")
    ] = False,
) -> None:
    """Write RUN/slurm/job.sbatch and submit it.

    The job resumes the run, and requeues itself when it is preempted or out of time.
    """
    settings = load_config(str(config), overrides or [])
    ranks = _ranks_per_node(gpus_per_node, ranks_per_node)
    settings.accumulation_steps(nodes * ranks)
    _check_paths(settings)
    options = {
        "--job-name": settings.run.name,
        "--nodes": str(nodes),
        "--ntasks-per-node": str(ranks),
        "--cpus-per-task": str(cpus_per_rank),
        "--gpus-per-node": str(gpus_per_node) if gpus_per_node else "",
        "--time": time,
        "--signal": f"USR1@{_lead(settings)}",
        "--output": str((settings.run_dir / "slurm" / "%j.log").resolve()),
    } | dict(further_option(option) for option in sbatch or [])
    script = settings.run_dir / "slurm" / "job.sbatch"
    script.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(script) as file:
        file.write(job_script(config.resolve(), overrides or [], options))
    if dry_run:
        echo(script.read_text(encoding="utf-8"))
        echo(f"written to {script}; nothing was submitted")
        return
    number = submit_script(script)
    log = options["--output"].replace("%j", number)
    echo(f"job {number}: {nodes} nodes x {ranks} ranks, script {script}")
    echo(
        f"watch: tail -F {log}; save and end: scancel --signal=USR1 {number} (it queues itself"
        f" again) or scancel {number}"
    )


def _ranks_per_node(gpus: int, ranks: int | None) -> int:
    if gpus and ranks not in (None, gpus):
        raise ConfigError(
            f"--ranks-per-node {ranks} and --gpus-per-node {gpus}: there is one rank for each GPU;"
            " leave one of them out"
        )
    return gpus or ranks or 1


def _lead(settings: Config) -> int:
    return max(LEAST_LEAD, round(settings.checkpoint.grace_seconds) + 60)


def _check_paths(settings: Config) -> None:
    """The job starts somewhere else, later: what it would not find should be said now."""
    if settings.data.remote is None and not (Path(settings.data.path) / "dataset.json").is_file():
        raise ConfigError(
            f"data.path = {settings.data.path} holds no dataset.json; prepare the dataset on a disk"
            " that all nodes see first"
        )


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = add_group(app, "slurm", help="Train on a Slurm cluster, see docs/clusters.md.")
    add_command(
        group,
        "submit",
        submit,
        example="nextpt slurm submit --config configs/1.3b.yaml --nodes 4 --sbatch --partition=gpu data.path=/data/shards",
    )
