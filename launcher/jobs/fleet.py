"""Training on several hosts over ssh: one node.py on each; all end when one ends."""

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

from launcher.jobs.hosts import (
    Host,
    HostAnswer,
    UnreachableError,
    exported_variables,
    probe,
    ssh_command,
)
from launcher.jobs.local import free_port, raise_interrupt
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

SSH_CONNECTION_LOST = 255  # exit code of ssh
# Seconds beyond train.hang_seconds in which other hosts must end after one has.
END_SECONDS = 45.0
CLOSE_SECONDS = 10.0  # in which a node ends after its standard input was closed
# Exit codes of one host that are the job's, whatever the other hosts end with; first the first.
DECISIVE_CODES = (EXIT_USER_ERROR, EXIT_RUN_IN_USE, EXIT_NO_VALID_CHECKPOINT, EXIT_REQUEUE)

Node = subprocess.Popen[str]  # ssh to one host, on which node.py runs


class Fleet:
    """A training on several hosts; `start` runs it once.

    Every start but the first continues without hosts that no longer answer.

    Args:
        config: YAML file.
        overrides: Config keys, key=value.
        hosts: The hosts, with their numbers of ranks.
        ssh: ssh command.
        port: TCP port of the rendezvous; None is a free one.
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
        self._nodes: list[Node] = []

    def start(self) -> int:
        """Train until all ranks have ended.

        Returns:
            The exit code of the job; see nextpt/base/errors.py.

        Raises:
            UserError: A host does not answer or differs from the others; nothing was started.
        """
        answers = self._probe_hosts()
        self.config.accumulation_steps(sum(host.slots for host in self.hosts))
        self.started = True
        # The ranks read the resolved config in the run folder, which all hosts share (see probe).
        config_file = self.config.run_dir.resolve() / "launch.yaml"
        with atomic_write(config_file) as file:
            file.write(to_yaml(self.config))
        address = answers[self.hosts[0].name]["address"] or self.hosts[0].name
        port = self.port or free_port()
        handlers = {number: signal.signal(number, self._send_signal) for number in SIGNALS}
        handlers[signal.SIGHUP] = signal.signal(signal.SIGHUP, raise_interrupt)
        self._nodes = []
        try:
            first_rank = 0
            for host in self.hosts:
                on_cpu = not answers[host.name]["gpus"]
                node = self._start_node(host, first_rank, address, port, config_file, on_cpu)
                self._nodes.append(node)
                first_rank += host.slots
            codes = self._wait()
        finally:
            self._end()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return self._job_code(codes)

    def _probe_hosts(self) -> dict[str, HostAnswer]:
        """Probe the hosts; after the first start without those that do not answer.

        Raises:
            UserError: A host does not answer at the first start, or the batch cannot be divided
                among the others.
        """
        while True:
            try:
                return probe(self.hosts, self.ssh, self.config)
            except UnreachableError as error:
                remaining = [host for host in self.hosts if host not in error.hosts]
                if not self.started or not remaining:
                    raise
                try:
                    self.config.accumulation_steps(sum(host.slots for host in remaining))
                except ConfigError as problem:
                    raise ConfigError(f"{error}; and without it {problem}") from error
                names = ", ".join(host.name for host in error.hosts)
                print(f"nextpt: continuing without {names}: {error}", file=sys.stderr, flush=True)
                self.hosts = remaining

    def _start_node(
        self,
        host: Host,
        first_rank: int,
        address: str,
        port: int,
        config_file: Path,
        on_cpu: bool,
    ) -> Node:
        request = {
            "action": "start",
            "folder": os.getcwd(),
            "slots": host.slots,
            "first_rank": first_rank,
            "address": address,
            "port": port,
            "world_size": sum(h.slots for h in self.hosts),
            "arguments": ["--config", str(config_file)],
            "variables": self.variables | ({"DS_ACCELERATOR": "cpu"} if on_cpu else {}),
        }
        node = subprocess.Popen(
            ssh_command(self.ssh, host), stdin=subprocess.PIPE, text=True, start_new_session=True
        )
        _write_line(node, json.dumps(request))
        return node

    def _wait(self) -> list[int]:
        """Wait for all nodes; returns their exit codes.

        When one has failed, the others get train.hang_seconds to notice it, and END_SECONDS.
        """
        deadline = float("inf")
        while any(node.poll() is None for node in self._nodes):
            if deadline == float("inf") and any(node.returncode for node in self._nodes):
                deadline = time.monotonic() + self.config.train.hang_seconds + END_SECONDS
            if time.monotonic() > deadline:
                self._end()
            time.sleep(0.1)
        return [node.returncode for node in self._nodes]

    def _send_signal(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: send the signal to the ranks of all hosts."""
        for node in self._nodes:
            _write_line(node, signal.Signals(number).name)

    def _end(self) -> None:
        """Close the standard input of all nodes, which then kill their ranks; then kill ssh."""
        for node in self._nodes:
            with suppress(OSError):
                if node.stdin:
                    node.stdin.close()
        deadline = time.monotonic() + CLOSE_SECONDS
        while any(node.poll() is None for node in self._nodes) and time.monotonic() < deadline:
            time.sleep(0.05)
        for node in self._nodes:
            if node.poll() is None:
                node.kill()
                node.wait()

    def _job_code(self, codes: list[int]) -> int:
        """Return the job's exit code.

        User errors and requested stops come first, then signals that killed ranks, lost hosts, and
        what the job itself recorded.
        """
        if not any(codes):
            return 0
        for code in DECISIVE_CODES:
            if code in codes:
                return code
        killed = [code for code in codes if code > 128 and code != SSH_CONNECTION_LOST]
        lost = [
            host.name
            for host, code in zip(self.hosts, codes, strict=True)
            if code == SSH_CONNECTION_LOST
        ]
        if lost:
            _print_error(f"the connection to {', '.join(lost)} was lost")
        if killed:
            number = killed[0] - 128
            _print_error(f"a rank was ended by signal {number} ({signal.strsignal(number)})")
            return killed[0]
        if lost or EXIT_HUNG in codes:
            return EXIT_HUNG
        record = read_exit_record(self.config.run_dir)
        return int(record["code"]) if record and record["code"] else EXIT_CRASHED


def _write_line(node: Node, line: str) -> None:
    with suppress(OSError, ValueError):  # a node that has ended is seen by its exit code
        if node.stdin:
            node.stdin.write(line + "\n")
            node.stdin.flush()


def _print_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
