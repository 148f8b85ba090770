"""Hosts on one machine: network namespaces on a bridge, each with a name, address and sshd."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

COMMANDS = ("ip", "sshd", "ssh", "ssh-keygen", "unshare")
BRIDGE, SUBNET = "nextpt0", "10.213.7"

SSHD = """Port 22
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile {folder}/{name}.pid
PermitRootLogin yes
StrictModes no
UsePAM no
PasswordAuthentication no
"""


def missing(*more: str) -> str | None:
    """Why this machine cannot run such hosts; None if it can.

    more: Further commands that a test needs.
    """
    if os.geteuid():
        return "network namespaces need root"
    lacking = [name for name in (*COMMANDS, *more) if shutil.which(name) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)} (make system-deps)"
    probe = subprocess.run(["ip", "netns", "add", "nextpt-probe"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", "nextpt-probe"], capture_output=True)
    return f"no network namespaces: {probe.stderr.strip()}" if probe.returncode else None


@dataclass(frozen=True)
class Hosts:
    """names: which `ssh` in `path` knows. Put `path` first in PATH."""

    folder: Path
    names: list[str]

    @property
    def variables(self) -> dict[str, str]:
        """Environment of commands that go to these hosts."""
        return {"PATH": f"{self.folder}:{os.environ['PATH']}", "PDSH_RCMD_TYPE": "ssh"}

    def address(self, name: str) -> str:
        return f"{SUBNET}.{self.names.index(name) + 2}"

    def hostfile(self, slots: int, *names: str) -> Path:
        path = self.folder / "hostfile"
        path.write_text("".join(f"{name} slots={slots}\n" for name in names or self.names))
        return path

    def cut(self, name: str) -> None:
        """Pull the cable of a host."""
        _run("ip", "link", "set", f"npt-{name}", "down")

    def reconnect(self, name: str) -> None:
        _run("ip", "link", "set", f"npt-{name}", "up")

    def start(
        self, name: str, command: list[str], environment: dict[str, str], log: Path
    ) -> subprocess.Popen:
        """Start a command in the network of a host, without ssh."""
        with open(log, "w") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", f"nextpt-{name}", *command],
                env=environment,
                stdout=output,
                stderr=output,
            )

    def processes(self, name: str) -> list[int]:
        """Numbers of the processes of a host."""
        return [int(pid) for pid in _run("ip", "netns", "pids", f"nextpt-{name}").split()]


@contextmanager
def hosts(
    folder: Path,
    count: int,
    *,
    prefix: str = "h",
    hidden: dict[str, Path] | None = None,
    variables: dict[str, str] | None = None,
) -> Iterator[Hosts]:
    """Make `count` hosts and end them with all their processes.

    They share this machine's disk, and see no processes but their own.

    prefix: of their names, before a number from 1 on. hidden: host -> folder in whose place it sees
    an empty one. variables: host -> a NAME=value of its own.
    """
    folder.mkdir(parents=True)
    network = Hosts(folder, [f"{prefix}{i}" for i in range(1, count + 1)])
    _clear(network.names)
    for key in ("host_key", "key"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
    _write_ssh(network)
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd requires it, and only its service makes it
    daemons = []
    try:
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
        _run("ip", "addr", "add", f"{SUBNET}.1/24", "dev", BRIDGE)
        _run("ip", "link", "set", BRIDGE, "up")
        for name in network.names:
            daemons.append(
                _start(network, name, (hidden or {}).get(name), (variables or {}).get(name))
            )
        for name in network.names:
            _wait_for(network, name)
        yield network
    finally:
        for name in network.names[: len(daemons)]:
            for pid in network.processes(name):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for daemon in daemons:
            daemon.wait()
        _clear(network.names)


def _write_ssh(network: Hosts) -> None:
    """A command `ssh` that knows the hosts: deepspeed passes no options to its own."""
    lines = [f"Host {name}\n  HostName {network.address(name)}\n" for name in network.names]
    (network.folder / "ssh_config").write_text(
        f"IdentityFile {network.folder}/key\nStrictHostKeyChecking no\nUserKnownHostsFile"
        " /dev/null\nLogLevel ERROR\nUser root\n" + "".join(lines)
    )
    command = network.folder / "ssh"
    command.write_text(
        f'#!/bin/sh\nexec {shutil.which("ssh")} -F {network.folder}/ssh_config "$@"\n'
    )
    command.chmod(0o755)


def _start(
    network: Hosts, name: str, hidden: Path | None, variable: str | None
) -> subprocess.Popen:
    space, outer, inner = f"nextpt-{name}", f"npt-{name}", "eth0"
    _run("ip", "netns", "add", space)
    _run("ip", "link", "add", outer, "type", "veth", "peer", "name", inner, "netns", space)
    _run("ip", "link", "set", outer, "master", BRIDGE)
    _run("ip", "link", "set", outer, "up")
    _run("ip", "-n", space, "addr", "add", f"{network.address(name)}/24", "dev", inner)
    _run("ip", "-n", space, "link", "set", inner, "up")
    _run("ip", "-n", space, "link", "set", "lo", "up")
    own = f"SetEnv OMP_NUM_THREADS=1 {variable or ''}\n"
    (network.folder / f"{name}.conf").write_text(
        SSHD.format(address=network.address(name), folder=network.folder, name=name) + own
    )
    hide = f"mount -t tmpfs none {hidden} && " if hidden else ""
    with open(network.folder / f"{name}.log", "w") as log:
        return subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                space,
                "unshare",
                "--uts",
                "--mount",
                "--pid",
                "--fork",
                "--mount-proc",
                "sh",
                "-c",
                (
                    f"hostname {name}; {hide}exec {shutil.which('sshd')} -D -e -f"
                    f" {network.folder}/{name}.conf"
                ),
            ],
            stdout=log,
            stderr=log,
        )


def _wait_for(network: Hosts, name: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while (
        completed := subprocess.run(
            [str(network.folder / "ssh"), name, "hostname"], capture_output=True, text=True
        )
    ).stdout.strip() != name:
        assert time.monotonic() < deadline, (
            f"{name}: {completed.stderr}{(network.folder / f'{name}.log').read_text()}"
        )
        time.sleep(0.1)


def _clear(names: list[str]) -> None:
    for name in names:
        # The kernel clears a namespace later, when it has time
        subprocess.run(["ip", "link", "del", f"npt-{name}"], capture_output=True)
        subprocess.run(["ip", "netns", "del", f"nextpt-{name}"], capture_output=True)
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)


def _run(*command: str) -> str:
    completed = subprocess.run(command, capture_output=True, text=True)
    assert completed.returncode == 0, f"{command}: {completed.stderr}"
    return completed.stdout
