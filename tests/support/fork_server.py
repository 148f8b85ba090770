"""Fork server for ranks: processes that start with everything imported, in a tenth of the time.

multiprocessing's fork server imports what a training job imports, once for each test process; a
rank is a fork of it in which `python ARGUMENTS` runs as it would in a new process.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from multiprocessing.context import ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.warm_imports"])


class ForkedPython:
    """A process of `start_python`, with the methods of subprocess.Popen that tests use."""

    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process
        self.pid = process.pid

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while the process runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Exit code once the process has ended. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL, unless the process has ended."""
        self.send_signal(signal.SIGKILL)


def start_python(arguments: list[str], environment: dict[str, str], log: Path) -> ForkedPython:
    """Run `python ARGUMENTS` (a file, or -m and a module, then its arguments) in a forked process.

    Args:
        arguments: As after `python`.
        environment: The whole environment of the process.
        log: File that stdout and stderr are written to.
    """
    process = _context.Process(target=_run, args=(arguments, environment, str(log)), name=log.stem)
    folder = Path.cwd()
    os.chdir(ROOT)  # the server starts in this folder, and imports from it
    try:
        process.start()
    finally:
        os.chdir(folder)
    return ForkedPython(process)


def _run(arguments: list[str], environment: dict[str, str], log: str) -> None:
    if "deepspeed" not in sys.modules:
        raise RuntimeError("the fork server did not import tests.support.warm_imports")
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # follows TMPDIR of the new environment
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    if arguments[0] == "-m":
        sys.argv[:] = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = arguments
        runpy.run_path(arguments[0], run_name="__main__")
