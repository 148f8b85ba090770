"""`nextpt slurm`: write the job script of a config and submit it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.console import echo
from launcher.options import Overrides, SbatchOptions
from launcher.registration import add_command, add_group
from nextpt.base.errors import ConfigError

if TYPE_CHECKING:
    from nextpt.config import Config

ConfigPath = Annotated[Path, typer.Option("--config", help="YAML file of the run, see configs/")]
Nodes = Annotated[int, typer.Option(min=1, help="number of nodes")]
GpusPerNode = Annotated[
    int, typer.Option(min=0, help="GPUs per node, one rank on each; 0 trains on CPUs")
]
RanksPerNode = Annotated[
    int | None, typer.Option(min=1, help="ranks per node without GPUs [default: 1]")
]
CpusPerRank = Annotated[int, typer.Option(min=1, help="CPU cores per rank")]
TimeLimit = Annotated[
    str,
    typer.Option(
        "--time",
        help="time limit in sbatch's format; before it the job saves and requeues itself",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="write and print the script, submit nothing")
]


def submit(
    config: ConfigPath,
    nodes: Nodes,
    overrides: Overrides = None,
    gpus_per_node: GpusPerNode = 8,
    ranks_per_node: RanksPerNode = None,
    cpus_per_rank: CpusPerRank = 8,
    time_limit: TimeLimit = "24:00:00",
    sbatch: SbatchOptions = None,
    dry_run: DryRun = False,
) -> None:
    """Write RUN/slurm/job.sbatch and submit it.

    The job resumes the run, and requeues itself when it is preempted or reaches the time limit.
    """
    from launcher.jobs.slurm import (
        check_time_limit,
        job_script,
        log_path,
        parse_sbatch_option,
        submit_script,
        train_options,
    )
    from nextpt.base.files import atomic_write
    from nextpt.config import load_config

    settings = load_config(str(config), overrides or [])
    ranks = _ranks_per_node(gpus_per_node, ranks_per_node)
    settings.accumulation_steps(nodes * ranks)
    _check_dataset(settings)
    options = train_options(
        settings,
        nodes=nodes,
        ranks_per_node=ranks,
        gpus_per_node=gpus_per_node,
        cpus_per_rank=cpus_per_rank,
        time_limit=time_limit,
    ) | dict(map(parse_sbatch_option, sbatch or []))
    check_time_limit(options)
    script = settings.run_dir / "slurm" / "job.sbatch"
    script.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(script) as file:
        file.write(job_script(config.resolve(), overrides or [], options))
    if dry_run:
        echo(script.read_text(encoding="utf-8"))
        echo(f"written to {script}; nothing was submitted")
        return
    job = submit_script(script)
    log = log_path(options["--output"], job)
    echo(f"job {job}: {nodes} nodes x {ranks} ranks, script {script}")
    echo(
        f"watch: tail -F {log}; save and requeue: scancel --signal=USR1 {job}; save and end:"
        f" scancel {job}"
    )


def _ranks_per_node(gpus: int, ranks: int | None) -> int:
    if gpus and ranks not in (None, gpus):
        raise ConfigError(
            f"--ranks-per-node {ranks} and --gpus-per-node {gpus}: there is one rank for each GPU;"
            " leave one of them out"
        )
    return gpus or ranks or 1


def _check_dataset(settings: Config) -> None:
    """Raise ConfigError for a dataset that the job would not find when it starts."""
    if settings.data.remote is None and not (Path(settings.data.path) / "dataset.json").is_file():
        raise ConfigError(
            f"data.path = {settings.data.path} holds no dataset.json; prepare the dataset on a disk"
            " that all nodes share first"
        )


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = add_group(app, "slurm", help="Train on a Slurm cluster, see docs/clusters.md.")
    add_command(
        group,
        "submit",
        submit,
        example=(
            "nextpt slurm submit --config configs/1.3b.yaml --nodes 4 --sbatch --partition=gpu"
            " data.path=/data/shards"
        ),
    )
