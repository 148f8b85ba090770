"""Training on this machine: starts ranks with the deepspeed launcher and forwards signals."""

from __future__ import annotations

import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from launcher.console import console
from launcher.jobs.group_guard import group_ends_with_this_process
from nextpt.base.errors import EXIT_CRASHED, EXIT_REQUEUE, ConfigError, UserError
from nextpt.base.processes import command_line, start_ticks
from nextpt.checkpoint.folders import steps
from nextpt.config import load_config
from nextpt.events import decided_batches, read_events
from nextpt.job.exit_record import read_exit_record
from nextpt.job.signals import SIGNALS

OUT_OF_MEMORY = (
    ", most likely because memory ran out (see dmesg; nextpt plan estimates what a run needs)"
)
RUN = Path(__file__).resolve().parents[1] / "run.py"
DEEPSPEED_LAUNCH = "deepspeed.launcher.launch"
EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")  # of Linux, ip(7)
FIRST_PORT = 16_384  # below are the ports of many services
PORT_ATTEMPTS = 20
KILL_SECONDS = 30.0  # in which the memory of a killed process is released


class StoppedBeforeRanksError(Exception):
    """A signal that asks to stop came before there were ranks to pass it on to."""


def train_command(config: str, overrides: list[str], ranks: int, port: int) -> list[str]:
    """Return the command line that starts ranks on this machine: deepspeed launcher/run.py ..."""
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

    SIGTERM and SIGUSR1 are passed on to the ranks, which save and exit (nextpt/job/signals.py).

    Args:
        config: YAML file.
        overrides: Config keys, key=value.
        ranks: Processes; None is one per GPU, 1 without GPUs.
        port: TCP port of the rendezvous; None is a free one.

    Returns:
        The exit code.

    Raises:
        KeyboardInterrupt: This process was interrupted or its terminal closed; all ranks were
            killed.
    """
    gpus = _count_gpus()
    command = train_command(config, overrides, ranks or default_ranks(), port or free_port())
    environment = _environment(config, overrides, ranks)
    if not gpus:
        environment.setdefault("DS_ACCELERATOR", "cpu")
    # In a session of its own: Ctrl-C reaches this process alone, not every rank, each of which
    # would print a traceback.
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    code = _wait(process)
    # -9 is of deepspeed itself; of a rank deepspeed passes it on as 247, a shell as 137.
    if code < 0 or code > 128:
        number = -code if code < 0 else 256 - code if code > 192 else code - 128
        reason = OUT_OF_MEMORY if number == signal.SIGKILL else ""
        _print_error(
            f"a rank was ended by signal {number} ({signal.strsignal(number)}){reason}; the same"
            " command resumes"
        )
        # A rank dies of one of SIGNALS only before it has anything to save.
        return EXIT_REQUEUE if number in SIGNALS else 128 + number
    return code or _recorded_code(load_config(config, overrides, warn_deprecated=False).run_dir)


def _environment(config: str, overrides: list[str], ranks: int | None) -> dict[str, str]:
    options = ["--ranks", str(ranks)] if ranks else []
    command = ["nextpt", "train", "--config", config, *options, *overrides]
    return os.environ | {
        "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore"),
        "NEXTPT_SUPERVISOR": str(os.getpid()),
        "NEXTPT_COMMAND": shlex.join(command),
    }


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait for the launcher with this process's signals passed on; returns its exit code."""
    handlers = {
        number: signal.signal(number, lambda number, frame: _signal_ranks(process.pid, number))
        for number in SIGNALS
    }
    handlers[signal.SIGHUP] = signal.signal(signal.SIGHUP, raise_interrupt)
    try:
        with group_ends_with_this_process(process.pid):
            code = process.wait()
        if code < 0:  # killed: what it started is still there
            _kill(process)
        return code
    except StoppedBeforeRanksError:
        _kill(process)
        return EXIT_REQUEUE
    except KeyboardInterrupt:
        _kill(process)
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _recorded_code(run: Path) -> int:
    """Return the exit code that a job recorded, where its launcher exits with 0.

    deepspeed's launcher also does so when the process below it was killed.
    """
    record = read_exit_record(run)
    if record is None and _is_complete(run):  # a full disk refused the record
        return 0
    if record is None:
        _print_error(
            f"training left no exit record ({run / 'exit.json'}). It was killed{OUT_OF_MEMORY};"
            " the same command resumes"
        )
        return EXIT_CRASHED
    return int(record["code"])


def _is_complete(run: Path) -> bool:
    """Whether a run has the checkpoint of its last step, by its config of the last start."""
    try:
        config = load_config(run / "config.yaml", warn_deprecated=False)
    except ConfigError:
        return False
    batches = decided_batches(config.batches, read_events(run / "metrics.jsonl", "batch"))
    return config.last_step_with(batches) in steps(run / "checkpoints")


def _signal_ranks(launcher: int, number: int) -> None:
    """Send a signal to the ranks and not to deepspeed's launchers.

    The launchers would die of it, or kill the ranks after 30 seconds.

    Raises:
        StoppedBeforeRanksError: There are no ranks yet.
    """
    descendants: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        descendants = psutil.Process(launcher).children(recursive=True)
    ranks = [process for process in descendants if _is_rank(command_line(process.pid))]
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.send_signal(number)
    if not ranks:
        raise StoppedBeforeRanksError


def _is_rank(command: str) -> bool:
    return f"{RUN} --local_rank" in command and DEEPSPEED_LAUNCH not in command


def raise_interrupt(number: int, frame: FrameType | None) -> None:
    """Signal handler: end as Ctrl-C does."""
    raise KeyboardInterrupt


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the launcher and its ranks, and show the cursor, which a live line hides."""
    with suppress(ProcessLookupError):
        # A checkpoint is committed or not: none is left half-written.
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # A rank that is not gone yet holds the run folder, and would have the next start refused.
    deadline = time.monotonic() + KILL_SECONDS
    while _has_members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    console.show_cursor(True)


def _has_members(group: int) -> bool:
    """Whether a process of a group has not ended."""
    for pid in psutil.pids():
        with suppress(OSError):
            if os.getpgid(pid) == group and start_ticks(pid) is not None:
                return True
    return False


def default_ranks() -> int:
    """Processes of a training on this machine where no number is asked for: one per GPU, or 1."""
    return max(_count_gpus(), 1)


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def free_port() -> int:
    """Return a TCP port without a listener.

    Ranks listen there seconds later. So it is not one of those that the system gives to sockets
    which ask for any, as long as there are others: any could be in use by then.

    Raises:
        UserError: The system has none left.
    """
    first = _first_ephemeral_port()
    # Not the global generator, whose state forks of one process share
    draw = random.SystemRandom().sample
    enough = first >= FIRST_PORT + PORT_ATTEMPTS
    below = draw(range(FIRST_PORT, first), PORT_ATTEMPTS) if enough else []
    for port in (*below, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError as error:
                reason = error.strerror
            else:
                return int(probe.getsockname()[1])
    raise UserError(
        f"no free TCP port on this machine ({reason}); close some connections, or give --port"
    )


def _first_ephemeral_port() -> int:
    """First port that the system gives out by itself; 0 where that is unknown."""
    try:
        return int(EPHEMERAL_PORTS.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0


def _print_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
