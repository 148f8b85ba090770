"""Processes that are gloo ranks, and training jobs on them.

`train_all` runs configs one after another in one set of processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from nextpt.config import Config, to_yaml
from tests.support.fork_server import ROOT, ForkedPython, start_python
from tests.support.ports import free_port


def run_ranks(arguments: list[str], world_size: int, folder: Path, **variables: str) -> None:
    """Start Python with `arguments` once per rank and wait for all.

    Their output goes to folder/rank-N.log.

    variables: of the environment, beside those of a launcher.

    Raises AssertionError with the ends of the logs when a rank fails.
    """
    processes = start_ranks([arguments] * world_size, folder, **variables)
    codes = end_ranks(processes, time.monotonic() + 1500)
    if any(codes):
        raise AssertionError(
            f"ranks ended with {codes}:\n"
            + "\n".join(p.read_text()[-3000:] for p in folder.glob("rank-*.log"))
        )


def start_ranks(arguments: list[list[str]], folder: Path, **variables: str) -> list[ForkedPython]:
    """Start Python once per rank, each with its own arguments, forked from the fork server."""
    world_size = len(arguments)
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    return [
        start_python(
            arguments[rank],
            _environment(rank, world_size, port, variables),
            folder / f"rank-{rank}.log",
        )
        for rank in range(world_size)
    ]


def start_new_ranks(
    arguments: list[str], world_size: int, folder: Path, **variables: str
) -> list[subprocess.Popen[bytes]]:
    """Start Python once per rank in new processes, for variables that are read by an import."""
    folder.mkdir(parents=True, exist_ok=True)
    port, processes = free_port(), []
    for rank in range(world_size):
        with open(folder / f"rank-{rank}.log", "wb") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *arguments],
                    env=_environment(rank, world_size, port, variables),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return processes


def end_ranks(processes: list[ForkedPython], deadline: float) -> list[int]:
    """Exit codes, negative for a signal. Ranks that run at the deadline (monotonic) are killed."""
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
    return [process.wait() for process in processes]


def _environment(
    rank: int, world_size: int, port: int, variables: dict[str, str]
) -> dict[str, str]:
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        **variables,
    }


def train_all(configs: list[Config], world_size: int, folder: Path) -> list[str | None]:
    """Train each config on `world_size` ranks.

    Returns per config the message of rank 0's error, or None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, config in enumerate(configs):
        files.append(folder / f"job-{number:03d}.yaml")
        files[-1].write_text(to_yaml(config))
    run_ranks(
        ["-m", "tests.support.ranks", str(folder / "outcomes.json"), *map(str, files)],
        world_size,
        folder,
    )
    return json.loads((folder / "outcomes.json").read_text())


def run_jobs(jobs: list[tuple[Config, int]], folder: Path) -> None:
    """Train each config on its number of ranks, in turn, with new processes for each.

    Raises AssertionError with the ends of the logs when a rank fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, (config, world_size) in enumerate(jobs):
        path = folder / f"job-{number:03d}.yaml"
        path.write_text(to_yaml(config))
        arguments = [str(ROOT / "launcher" / "run.py"), "--config", str(path)]
        run_ranks(arguments, world_size, folder / path.stem)


def _main(outcomes: str, files: list[str]) -> None:
    from nextpt.base.errors import UserError
    from nextpt.config import load_config
    from nextpt.observe.trackers import open_trackers
    from nextpt.train.run import run_training

    messages: list[str | None] = []
    for file in files:
        try:
            run_training(load_config(file), open_trackers)
            messages.append(None)
        except UserError as error:
            messages.append(str(error))
    if os.environ["RANK"] == "0":
        Path(outcomes).write_text(json.dumps(messages))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2:])
