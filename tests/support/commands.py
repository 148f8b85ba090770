"""Processes of `nextpt ARGUMENTS` and `python ARGUMENTS`, forked with everything imported.

A test of the start itself (imports, sys.path, options of the interpreter) starts an interpreter.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from tests.support.fork_server import ROOT, ForkedPython, start_python


class Command:
    """A process of `start_script`, with the methods of subprocess.Popen that tests use.

    Its output goes to files and is read when it has ended: what a process below it holds open keeps
    nobody waiting.
    """

    def __init__(
        self, arguments: list[str], environment: dict[str, str], cwd: Path, new_session: bool
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="nextpt-command-")
        self._files = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        self._process: ForkedPython = start_python(
            arguments, environment, *self._files, cwd=cwd, new_session=new_session
        )
        self.pid, self.wait, self.kill = self._process.pid, self._process.wait, self._process.kill
        self.send_signal = self._process.send_signal

    @property
    def returncode(self) -> int | None:
        """Exit code, negative for a signal; None while the process runs."""
        return self._process.poll()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Stdout and stderr of the process once it has ended. Raises subprocess.TimeoutExpired."""
        self.wait(timeout)
        stdout, stderr = (file.read_text() for file in self._files)
        return stdout, stderr


def start_command(
    *arguments: str, cwd: Path = ROOT, new_session: bool = False, **variables: str
) -> Command:
    """Start `nextpt ARGUMENTS`.

    Args:
        arguments: Of the command line.
        cwd: Working directory.
        new_session: Whether the process leads a session of its own.
        variables: Of the environment, beside those of this process.
    """
    variables = {"COLUMNS": "120"} | variables
    return start_script(
        "-m", "launcher.cli", *arguments, cwd=cwd, new_session=new_session, **variables
    )


def start_script(
    *arguments: str, cwd: Path = ROOT, new_session: bool = False, **variables: str
) -> Command:
    """Start `python ARGUMENTS`; the parameters are those of `start_command`."""
    return Command([*arguments], os.environ | variables, cwd, new_session)


def run_command(
    *arguments: str, cwd: Path = ROOT, timeout: float = 900, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `nextpt ARGUMENTS` to its end.

    Raises:
        subprocess.TimeoutExpired: It ran longer than `timeout` seconds, and was killed.
    """
    return _finish(start_command(*arguments, cwd=cwd, **variables), arguments, timeout)


def run_script(
    *arguments: str, cwd: Path = ROOT, timeout: float = 900, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` to its end; otherwise like `run_command`."""
    return _finish(start_script(*arguments, cwd=cwd, **variables), arguments, timeout)


def _finish(
    command: Command, arguments: tuple[str, ...], timeout: float
) -> subprocess.CompletedProcess[str]:
    try:
        stdout, stderr = command.communicate(timeout)
    finally:
        command.kill()
    return subprocess.CompletedProcess(arguments, command.wait(), stdout, stderr)
