"""`nextpt train`: train on this machine or on the hosts of a hostfile."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from launcher.options import ConfigFile, Overrides, Ranks
from launcher.registration import add_command
from nextpt.base.errors import ConfigError

Port = Annotated[
    int | None,
    typer.Option(
        min=1, max=65535, help="TCP port of the rendezvous of the ranks [default: a free one]"
    ),
]
Hostfile = Annotated[
    Path | None,
    typer.Option(help="train on the hosts of this file, lines `NAME slots=N`, over ssh"),
]
Ssh = Annotated[str, typer.Option(help="ssh command, such as 'ssh -p 2222'")]
Restarts = Annotated[
    int,
    typer.Option(
        min=0,
        help="maximum restarts in a row, without a new checkpoint, after a hang, crash or kill",
    ),
]


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    ranks: Ranks = None,
    port: Port = None,
    hostfile: Hostfile = None,
    ssh: Ssh = "ssh",
    restarts: Restarts = 3,
) -> None:
    """Train on this machine or on the hosts of a hostfile; the same command resumes the run.

    SIGTERM and SIGUSR1 save a checkpoint and exit. Exit codes: 0 finished, 1 crashed, 2 user error,
    4 another job uses the run folder, 65 no valid checkpoint among those that exist, 75 stopped by
    a signal, 76 a rank does not answer, 128+N ended by signal N. RUN/exit.json has the reason.

    On a cluster also: `deepspeed --hostfile HOSTS launcher/run.py --config FILE`, or `nextpt slurm
    submit`; see docs/clusters.md.
    """
    from launcher.jobs.fleet import Fleet
    from launcher.jobs.hosts import read_hostfile
    from launcher.jobs.local import start_training
    from launcher.jobs.supervise import supervise
    from nextpt.config import load_config
    from nextpt.observe.trackers import check_trackers

    # Without a hostfile rank 0 reads the file too, and warns.
    settings = load_config(config, overrides or [], warn_deprecated=hostfile is not None)
    check_trackers(settings)  # before any process starts
    if hostfile and ranks:
        raise ConfigError(
            "--ranks is for this machine; the hostfile gives the ranks of each host (slots=N)"
        )
    if hostfile:
        start = Fleet(config, overrides or [], read_hostfile(hostfile), ssh, port).start
    else:
        start = partial(start_training, config, overrides or [], ranks, port)
    sys.exit(supervise(start, settings.run_dir, restarts))


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    add_command(
        app, "train", train, example="nextpt train --config configs/demo.yaml train.steps=50"
    )
