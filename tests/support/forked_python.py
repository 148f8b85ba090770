"""Forked Python: `python ARGUMENTS` in a fork of a process that has imported what it imports.

For the child: everything that a new interpreter would have of its own and a fork has of its parent.
A process that runs so also forks, in place of starting new interpreters, the deepspeed launchers
and the ranks below it; they are its children, as ever, with the command lines that they would have.
"""

from __future__ import annotations

import ctypes
import logging
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RUN = str(ROOT / "launcher" / "run.py")
# What a command starts with `python -m`, and imports nothing that the fork server has not.
MODULES = ("launcher.cli", "deepspeed.launcher.runner", "deepspeed.launcher.launch")


def run_python(arguments: list[str], environment: Mapping[str, str], cwd: str | None) -> int:
    """Run `python ARGUMENTS` in this process, just forked; returns the exit code.

    Args:
        arguments: As after `python`: a file, -m and a module, or -c and source; then its
            arguments.
        environment: The whole environment of the process.
        cwd: Working directory; None is that of the parent.
    """
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # follows TMPDIR of the new environment
    if cwd is not None:
        os.chdir(cwd)
    _set_command_line([sys.executable, *arguments])
    if "PYTHONWARNINGS" in environment:
        warnings.simplefilter(environment["PYTHONWARNINGS"])
    for name in [name for name in sys.modules if name.partition(".")[0] == "launcher"]:
        del sys.modules[name]  # its console reads the environment when it is imported
    if not isinstance(subprocess._fork_exec, _ForkExec):
        subprocess._USE_POSIX_SPAWN = False
        subprocess._fork_exec = _ForkExec(subprocess._fork_exec)
    try:
        if arguments[0] == "-m":
            sys.argv[:] = arguments[1:]
            sys.path.insert(0, os.getcwd())
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            sys.argv[:] = ["-c", *arguments[2:]]
            sys.path.insert(0, "")
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(arguments[1], "<string>", "exec"), main.__dict__)
        else:
            sys.argv[:] = arguments
            sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


class _ForkExec:
    """Replaces the function of `subprocess` that starts a program: these programs are forked."""

    def __init__(self, original: Callable[..., int]) -> None:
        self.original = original
        names = list(logging.root.manager.loggerDict)
        self.levels = {name: logging.getLogger(name).level for name in names}

    def __call__(self, command: Sequence[str], *options: Any) -> int:
        arguments = _arguments_of(command)
        if arguments is None or threading.active_count() > 1:
            return self.original(command, *options)
        sys.stdout.flush()
        sys.stderr.flush()
        if pid := os.fork():
            return pid
        code = 70
        try:
            environment, cwd = self._become_new(command, *options)
            code = run_python(arguments, environment, cwd)
            threading._shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _become_new(
        self,
        command: Sequence[str],
        executables: Sequence[bytes],
        close_fds: bool,
        kept_files: Sequence[int],
        cwd: str | None,
        environment: list[bytes] | None,
        *options: Any,
    ) -> tuple[Mapping[str, str], str | None]:
        """What `subprocess` and the system do between a fork and the main of the new program.

        Returns the environment and the working directory.
        """
        files, (_, error_pipe) = options[:6], options[6:8]
        _, start_new_session, process_group = options[8:11]
        for target, file in enumerate((files[0], files[3], files[5])):  # stdin, stdout, stderr
            if file != -1:
                os.dup2(file, target)
        kept = sorted({0, 1, 2, *kept_files} - {error_pipe})
        for low, high in zip(kept, [*kept[1:], os.sysconf("SC_OPEN_MAX")], strict=True):
            os.closerange(low + 1, high)
        if start_new_session:
            os.setsid()
        if process_group >= 0:
            os.setpgid(0, process_group)
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        for name, level in self.levels.items():
            logging.getLogger(name).setLevel(level)
        sys.stdout.reconfigure(write_through="-u" in command)
        pairs = (os.fsdecode(pair).partition("=") for pair in environment or ())
        return dict(os.environ) if environment is None else {k: v for k, _, v in pairs}, cwd


def _arguments_of(command: Sequence[str]) -> list[str] | None:
    """Arguments of a command that this process can be forked for, without -u; otherwise None."""
    if command[0] != sys.executable:
        return None
    arguments = [*command[2 if command[1] == "-u" else 1 :]]
    known = arguments[1] in MODULES if arguments[0] == "-m" else arguments[0] == RUN
    return arguments if known else None


def _set_command_line(command: list[str]) -> None:
    """Overwrite what /proc shows as the command line of this process, as setproctitle does."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end of proc(5)
    line = b"\0".join(os.fsencode(word) for word in command) + b"\0"
    if len(line) > end - start:
        raise RuntimeError(f"{len(line)} bytes of command line; there is room for {end - start}")
    ctypes.memmove(start, line.ljust(end - start, b"\0"), end - start)
