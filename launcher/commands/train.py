"""`nextpt train`: train on this machine or on the hosts of a hostfile."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from launcher.options import Overrides
from launcher.registration import add_command


def train(
    config: Annotated[str, typer.Option(help="YAML file, see configs/")],
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="processes; one per GPU, or 1 without, unless given")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="TCP port where ranks meet; a free one unless given"),
    ] = None,
    hostfile: Annotated[
        Path | None,
        typer.Option(help="train on the hosts of this file, lines `NAME slots=N`, over ssh"),
    ] = None,
    ssh: Annotated[str, typer.Option(help="how hosts are reached, such as 'ssh -p 2222'")] = "ssh",
    restarts: Annotated[
        int,
        typer.Option(
            min=0,
            help=(
                "how often in a row, without a new checkpoint, to start again what hung, crashed or"
                " was killed"
            ),
        ),
    ] = 3,
) -> None:
    """Train on this machine, or on the hosts of a hostfile. The same command again resumes the run.

    SIGTERM and SIGUSR1 save and end. Exit codes: 0 finished, 1 crashed, 2 a mistake to mend first,
    4 another job works in the run folder, 65 no valid checkpoint where there were some, 75 told to
    stop, 76 a rank did not answer, 128+N ended by signal N. RUN/exit.json has the reason.

    On a cluster also: `deepspeed --hostfile HOSTS launcher/run.py --config FILE`, or `nextpt slurm
    submit`; see docs/clusters.md.
    """
    from launcher.jobs.fleet import Fleet
    from launcher.jobs.hosts import read_hostfile
    from launcher.jobs.local import start_training
    from launcher.jobs.supervise import supervise
    from nextpt.base.errors import ConfigError
    from nextpt.config import load_config
    from nextpt.observe.trackers import check_trackers

    settings = load_config(config, overrides or [], warn_deprecated=False)  # rank 0 warns
    check_trackers(settings)  # a wrong key is told before any process starts
    if hostfile and ranks:
        raise ConfigError(
            "--ranks is for this machine; the hostfile says how many each host has (slots=N)"
        )
    if hostfile:
        start = Fleet(config, overrides or [], read_hostfile(hostfile), ssh, port).start
    else:
        start = lambda: start_training(config, overrides or [], ranks, port)  # noqa: E731
    sys.exit(supervise(start, settings.run_dir, restarts))


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    add_command(
        app, "train", train, example="nextpt train --config configs/demo.yaml train.steps=50"
    )
