"""Starting ranks on this machine with the deepspeed launcher."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

from launcher.console import console
from nextpt.base.errors import EXIT_CRASHED, EXIT_REQUEUE, UserError
from nextpt.base.processes import child_pids, command_line
from nextpt.config import load_config
from nextpt.job.exit_record import read_exit_record
from nextpt.job.signals import SIGNALS

OUT_OF_MEMORY = (
    ", most likely because memory ran out (see dmesg; nextpt plan tells what a run needs)"
)
RUN = Path(__file__).resolve().parents[1] / "run.py"
LAUNCH = "deepspeed.launcher.launch"


class Told(Exception):
    """This process was told to end before there were ranks."""


def train_command(config: str, overrides: list[str], ranks: int, port: int) -> list[str]:
    """The command that a person would type: deepspeed launcher/run.py --config ... on this machine."""
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        str(ranks),
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(port),
        "--log_level",
        "critical",
        "--hostfile",
        os.devnull,
        str(RUN),
        "--config",
        config,
        *overrides,
    ]


def start_training(
    config: str, overrides: list[str], ranks: int | None = None, port: int | None = None
) -> int:
    """Train on this machine.

    Returns the exit code. ranks: one per GPU, or 1 without GPUs, unless given.

    SIGTERM and SIGUSR1 go on to the ranks, which save and end (nextpt/job/signals.py). Raises
    KeyboardInterrupt, with all ranks ended, when this process is interrupted or its terminal
    closed.
    """
    environment = os.environ | {
        "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore"),
        "NEXTPT_SUPERVISOR": str(os.getpid()),
        "NEXTPT_COMMAND": shlex.join(
            [
                "nextpt",
                "train",
                "--config",
                config,
                *(["--ranks", str(ranks)] if ranks else []),
                *overrides,
            ]
        ),
    }
    if not _gpus():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    command = train_command(config, overrides, ranks or max(_gpus(), 1), port or free_port())
    # In a session of its own: Ctrl-C reaches this process alone, and not every rank, each with a
    # traceback to show.
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    before = {
        number: signal.signal(number, lambda number, frame: _tell_ranks(process.pid, number))
        for number in SIGNALS
    }
    before[signal.SIGHUP] = signal.signal(signal.SIGHUP, interrupt)
    try:
        code = process.wait()
    except Told:
        _end(process)
        return EXIT_REQUEUE
    except KeyboardInterrupt:
        _end(process)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    # Of deepspeed itself -9; of a rank deepspeed passes it on as 247, a shell as 137
    if code < 0 or code > 128:
        number = -code if code < 0 else 256 - code if code > 192 else code - 128
        print(
            f"error: a rank was ended by signal {number}"
            f" ({signal.strsignal(number)}){OUT_OF_MEMORY if number == signal.SIGKILL else ''}; the"
            " same command resumes",
            file=sys.stderr,
            flush=True,
        )
        # Of SIGNALS a rank dies only before it has anything to save
        return EXIT_REQUEUE if number in SIGNALS else 128 + number
    return code or _recorded_code(load_config(config, overrides, warn_deprecated=False).run_dir)


def _recorded_code(run: Path) -> int:
    """The code of a job whose launcher says 0: deepspeed's says so too when the process below it was killed."""
    end = read_exit_record(run)
    if end is None:
        print(
            f"error: training ended without a word: {run / 'exit.json'} is not there. Something"
            f" killed it{OUT_OF_MEMORY}; the same command resumes",
            file=sys.stderr,
            flush=True,
        )
        return EXIT_CRASHED
    return end["code"]


def _tell_ranks(launcher: int, number: int) -> None:
    """Pass a signal on to the ranks only: deepspeed's launchers would die of it, or kill the ranks after 30 s.

    Where there are no ranks yet, nothing is lost: the launcher is ended.
    """
    below = [launcher]
    for pid in below:  # grows while it is read
        below += child_pids(pid)
    told = [
        pid
        for pid in below
        if f"{RUN} --local_rank" in (command := command_line(pid)) and LAUNCH not in command
    ]
    for pid in told:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    if not told:
        raise Told


def interrupt(number: int, frame: FrameType | None) -> None:
    """A handler: end as Ctrl-C does."""
    raise KeyboardInterrupt


def _end(process: subprocess.Popen) -> None:
    """End the launcher and its ranks, and give the terminal its cursor back, which a live line hides."""
    with suppress(ProcessLookupError):
        # A checkpoint exists or does not: nothing can be half-written
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    console.show_cursor(True)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def free_port() -> int:
    """A TCP port that nobody listens on. Raises UserError when the system has none left."""
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]
    except OSError as error:
        raise UserError(
            f"no free TCP port on this machine ({error.strerror}); close some connections, or give"
            " --port"
        ) from error
