"""Training on several hosts over ssh: one node.py on each, told through its standard input, all ended when one ends."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from launcher.jobs.hosts import Host, Unreachable, exported_variables, probe, ssh_command
from launcher.jobs.local import free_port, interrupt
from nextpt.base.errors import (
    EXIT_CRASHED,
    EXIT_HUNG,
    EXIT_NO_VALID_CHECKPOINT,
    EXIT_REQUEUE,
    EXIT_RUN_IN_USE,
    EXIT_USER_ERROR,
    ConfigError,
)
from nextpt.base.files import atomic_write
from nextpt.config import load_config, to_yaml
from nextpt.job.exit_record import read_exit_record
from nextpt.job.signals import SIGNALS

LOST = 255  # of ssh: the connection, and with it the host
AFTER = 45.0  # seconds beyond train.hang_seconds that other hosts have to end when one did


class Fleet:
    """A training on hosts; `start` runs it once.

    The second start leaves out hosts that are no longer there.

    Raises UserError (Unreachable, ConfigError) before anything starts.
    """

    def __init__(
        self, config: str, overrides: list[str], hosts: list[Host], ssh: str, port: int | None
    ) -> None:
        self.config = load_config(config, overrides, warn_deprecated=False)
        self.hosts = hosts
        self.ssh = ssh
        self.port = port
        self.variables = exported_variables() | {
            "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore"),
            "NEXTPT_COMMAND": shlex.join(["nextpt", *sys.argv[1:]]),
        }
        self.started = False
        self._nodes: list[subprocess.Popen] = []

    def start(self) -> int:
        """Train until all ranks have ended.

        Returns the exit code of the job; see nextpt/base/errors.py.
        """
        answers = self._reachable()
        self.config.accumulation_steps(sum(host.slots for host in self.hosts))
        self.started = True
        # What the ranks read is in the run folder, which all hosts were seen to share.
        settings = self.config.run_dir.resolve() / "launch.yaml"
        with atomic_write(settings) as file:
            file.write(to_yaml(self.config))
        address = answers[self.hosts[0].name]["address"] or self.hosts[0].name
        port = self.port or free_port()
        before = {number: signal.signal(number, self._tell) for number in SIGNALS}
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, interrupt)
        self._nodes = []
        try:
            first = 0
            for host in self.hosts:
                self._nodes.append(
                    self._start(
                        host, first, address, port, settings, cpu=not answers[host.name]["gpus"]
                    )
                )
                first += host.slots
            codes = self._wait()
        finally:
            self._end()
            for number, handler in before.items():
                signal.signal(number, handler)
        return self._code(codes)

    def _reachable(self) -> dict[str, dict[str, Any]]:
        """Answers of the hosts.

        After the first start those that do not answer are left out, where the batch allows it.
        """
        while True:
            try:
                return probe(self.hosts, self.ssh, self.config)
            except Unreachable as error:
                rest = [host for host in self.hosts if host not in error.hosts]
                if not self.started or not rest:
                    raise
                try:
                    self.config.accumulation_steps(sum(host.slots for host in rest))
                except ConfigError as problem:
                    raise ConfigError(f"{error}; and without it {problem}") from error
                print(
                    f"nextpt: going on without {', '.join(host.name for host in error.hosts)}:"
                    f" {error}",
                    file=sys.stderr,
                    flush=True,
                )
                self.hosts = rest

    def _start(
        self, host: Host, first: int, address: str, port: int, settings: Path, cpu: bool
    ) -> subprocess.Popen:
        request = {
            "action": "start",
            "folder": os.getcwd(),
            "slots": host.slots,
            "first_rank": first,
            "address": address,
            "port": port,
            "world_size": sum(h.slots for h in self.hosts),
            "arguments": ["--config", str(settings)],
            "variables": self.variables | ({"DS_ACCELERATOR": "cpu"} if cpu else {}),
        }
        node = subprocess.Popen(
            ssh_command(self.ssh, host), stdin=subprocess.PIPE, text=True, start_new_session=True
        )
        _write(node, json.dumps(request))
        return node

    def _wait(self) -> list[int]:
        """Exit codes of all nodes.

        When one has ended badly the others get the time in which they find that out.
        """
        deadline = float("inf")
        while any(node.poll() is None for node in self._nodes):
            if deadline == float("inf") and any(node.returncode for node in self._nodes):
                deadline = time.monotonic() + self.config.train.hang_seconds + AFTER
            if time.monotonic() > deadline:
                self._end()
            time.sleep(0.1)
        return [node.returncode for node in self._nodes]

    def _tell(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on to the ranks of all hosts."""
        for node in self._nodes:
            _write(node, signal.Signals(number).name)

    def _end(self) -> None:
        """Close the standard input of all nodes, on which they kill their ranks, and then ssh itself."""
        for node in self._nodes:
            with suppress(OSError):
                node.stdin.close()
        deadline = time.monotonic() + 10
        while any(node.poll() is None for node in self._nodes) and time.monotonic() < deadline:
            time.sleep(0.05)
        for node in self._nodes:
            if node.poll() is None:
                node.kill()
                node.wait()

    def _code(self, codes: list[int]) -> int:
        """One code for the job: what a person must mend or wished comes first, then what happened to the ranks."""
        if not any(codes):
            return 0
        for code in (EXIT_USER_ERROR, EXIT_RUN_IN_USE, EXIT_NO_VALID_CHECKPOINT, EXIT_REQUEUE):
            if code in codes:
                return code
        end = read_exit_record(self.config.run_dir)
        killed = [code for code in codes if code > 128 and code != LOST]
        lost = [host.name for host, code in zip(self.hosts, codes, strict=True) if code == LOST]
        if lost:
            print(
                f"error: the connection to {', '.join(lost)} was lost", file=sys.stderr, flush=True
            )
        if killed:
            print(
                f"error: a rank was ended by signal {killed[0] - 128}"
                f" ({signal.strsignal(killed[0] - 128)})",
                file=sys.stderr,
                flush=True,
            )
        return (
            killed[0]
            if killed
            else EXIT_HUNG
            if lost or EXIT_HUNG in codes
            else end["code"]
            if end and end["code"]
            else EXIT_CRASHED
        )


def _write(node: subprocess.Popen, line: str) -> None:
    with suppress(OSError, ValueError):  # that a node is gone is seen by its exit code
        node.stdin.write(line + "\n")
        node.stdin.flush()
