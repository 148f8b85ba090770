"""Starting ranks on this machine with the deepspeed launcher."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

from launcher.console import out
from nextpt.errors import UserError

OUT_OF_MEMORY = ", most likely because memory ran out (see dmesg; nextpt plan tells what a run needs)"
RUN = Path(__file__).resolve().parent / "run.py"


def train_command(config: str, overrides: list[str], ranks: int, port: int) -> list[str]:
    """The command that a person would type: deepspeed launcher/run.py --config ... on this machine."""
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_addr", "127.0.0.1",
        "--master_port", str(port), "--log_level", "critical", "--hostfile", os.devnull, str(RUN), "--config", config, *overrides,
    ]


def start_training(config: str, overrides: list[str], ranks: int | None = None, port: int | None = None) -> int:
    """Train on this machine; returns the exit code. ranks: one per GPU, or 1 without GPUs, unless given.

    Raises KeyboardInterrupt, with all ranks ended, when this process is interrupted or told to end.
    """
    environment = os.environ | {"PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore")}
    if not _gpus():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    command = train_command(config, overrides, ranks or max(_gpus(), 1), port or free_port())
    # In a session of its own: Ctrl-C reaches this process alone, and not every rank, each with a traceback to show.
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        code = process.wait()
    except KeyboardInterrupt:
        _end(process)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code < 0 or code > 128:  # of deepspeed itself -9; of a rank deepspeed passes it on as 247, a shell as 137
        number = -code if code < 0 else 256 - code if code > 192 else code - 128
        print(f"error: a rank was ended by signal {number} ({signal.strsignal(number)}){OUT_OF_MEMORY if number == signal.SIGKILL else ''}; "
              "the same command resumes", file=sys.stderr, flush=True)
    return code


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _end(process: subprocess.Popen) -> None:
    """End the launcher and its ranks, and give the terminal its cursor back, which a live line hides."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        os.killpg(process.pid, signal.SIGKILL)  # ranks that did not listen
    process.wait()
    out.show_cursor(True)


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
        raise UserError(f"no free TCP port on this machine ({error.strerror}); close some connections, or give --port") from error
