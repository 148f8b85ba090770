"""Hosts of a training: hostfile, exported variables, and the checks before ranks start."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from nextpt.base.errors import ConfigError, UserError
from nextpt.base.files import sha256_file
from nextpt.config import Config

NODE = Path(__file__).resolve().parent / "node.py"
# Without prompts; a connection without an answer for 15 s counts as lost.
SSH_OPTIONS = (
    "-o",
    "BatchMode=yes",
    "-o",
    "ConnectTimeout=10",
    "-o",
    "ServerAliveInterval=5",
    "-o",
    "ServerAliveCountMax=3",
)
PROBE_SECONDS = 120
_LINE = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)\s+slots=(?P<slots>[0-9]{1,4})\s*(#.*)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[A-Za-z0-9_@%+=:,./~-]*")


@dataclass(frozen=True)
class Host:
    """A line of a hostfile.

    Attributes:
        name: Name of the host for ssh.
        slots: Number of ranks on it.
    """

    name: str
    slots: int


class HostAnswer(TypedDict):
    """Answer of node.py's `look`.

    Attributes:
        versions: Library -> version.
        gpus: Number of GPUs that torch sees.
        folder: Whether the working folder exists there.
        mark: Whether the host sees the run folder.
        data: SHA-256 of the dataset's manifest, or None.
        address: Address by which this machine reached the host, or None.
    """

    versions: dict[str, str]
    gpus: int
    folder: bool
    mark: bool
    data: str | None
    address: str | None


class UnreachableError(UserError):
    """Hosts that do not answer.

    Attributes:
        hosts: The hosts.
    """

    def __init__(self, message: str, hosts: list[Host]) -> None:
        super().__init__(message)
        self.hosts = hosts


def read_hostfile(path: Path) -> list[Host]:
    """Read the hosts of a file with lines `NAME slots=N`.

    Empty lines and lines that begin with # are skipped. Stricter than deepspeed, which passes names
    to shells and trains on this machine alone where the file does not exist.

    Raises:
        ConfigError: The file cannot be read or a line has another form.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"hostfile {path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    hosts: list[Host] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if not match or int(match["slots"]) == 0:
            raise ConfigError(
                f"hostfile {path}, line {number}: {line.strip()!r} is not of the form `NAME"
                " slots=N` with N at least 1 (a name is letters, digits, dots, _ and -)"
            )
        if match["name"] in {host.name for host in hosts}:
            raise ConfigError(
                f"hostfile {path}, line {number}: host {match['name']} is listed twice; give it one"
                " line with all its slots"
            )
        hosts.append(Host(match["name"], int(match["slots"])))
    if not hosts:
        raise ConfigError(
            f"hostfile {path} names no host; it needs lines of the form `NAME slots=N`"
        )
    return hosts


def exported_variables() -> dict[str, str]:
    """Read the variables of ~/.deepspeed_env and ./.deepspeed_env, which all hosts get.

    deepspeed pastes their values into a shell command on every host: values with characters that a
    shell interprets are refused.

    Raises:
        ConfigError: A line has another form.
    """
    variables: dict[str, str] = {}
    for path in (Path.home() / ".deepspeed_env", Path(".deepspeed_env")):
        lines = path.read_text(encoding="utf-8-sig").splitlines() if path.is_file() else []
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            if not _VARIABLE.fullmatch(line.strip()):
                raise ConfigError(
                    f"{path}, line {number}: {line.strip()!r} is not NAME=value with a value of"
                    " letters, digits and @%+=:,./~_-; deepspeed would pass it to a shell on every"
                    " host"
                )
            name, _, value = line.strip().partition("=")
            variables[name] = value
    return variables


def ssh_command(ssh: str, host: Host) -> list[str]:
    """Return the command that starts launcher/jobs/node.py on a host.

    The request goes through its standard input.
    """
    return [
        *shlex.split(ssh),
        *SSH_OPTIONS,
        host.name,
        f"exec {shlex.quote(sys.executable)} -u {shlex.quote(str(NODE))}",
    ]


def probe(hosts: list[Host], ssh: str, config: Config) -> dict[str, HostAnswer]:
    """Ask every host to describe itself (node.py, `look`) and check that all agree.

    Returns:
        Name of each host -> its answer.

    Raises:
        UnreachableError: Hosts do not answer.
        UserError: A host differs; names the host and the difference.
    """
    run = config.run_dir.resolve()
    data = Path(config.data.path).resolve() / "dataset.json"
    with _mark(run) as mark:
        request = {
            "action": "describe",
            "folder": os.getcwd(),
            "mark": str(mark),
            "data": None if config.data.remote else str(data),
        }
        with ThreadPoolExecutor(min(len(hosts), 32)) as threads:
            replies = list(threads.map(lambda host: _ask(ssh, host, request), hosts))
    silent = {
        host: reply for host, reply in zip(hosts, replies, strict=True) if isinstance(reply, str)
    }
    if silent:
        raise UnreachableError(
            "; ".join(f"host {host.name}: {problem}" for host, problem in silent.items()),
            list(silent),
        )
    answers = {
        host.name: reply
        for host, reply in zip(hosts, replies, strict=True)
        if not isinstance(reply, str)
    }
    data_hash = sha256_file(data) if data.is_file() and not config.data.remote else None
    for host in hosts:
        _check(host, answers[host.name], run, data, data_hash)
    _compare_versions(answers)
    return answers


@contextmanager
def _mark(run: Path) -> Iterator[Path]:
    """Create a file in the run folder that every host must see, for the time of the probe."""
    run.mkdir(parents=True, exist_ok=True)
    mark = run / f".shared-{secrets.token_hex(8)}"
    mark.touch()
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)


def _ask(ssh: str, host: Host, request: dict[str, Any]) -> HostAnswer | str:
    """Return the answer of a host, or the problem."""
    try:
        process = subprocess.run(
            ssh_command(ssh, host),
            input=json.dumps(request) + "\n",
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"no answer for {PROBE_SECONDS} s"
    except OSError as error:
        return f"{shlex.split(ssh)[0]} cannot be started ({error.strerror})"
    if process.returncode == 0 and process.stdout.strip():
        answer: HostAnswer = json.loads(process.stdout.strip().splitlines()[-1])
        return answer
    message = " ".join(process.stderr.split())[-300:] or f"exit code {process.returncode}"
    if process.returncode == 255:
        return f"not reachable by ssh without a password ({message})"
    is_missing = "No such file" in message or "can't open file" in message
    if process.returncode in (126, 127) or is_missing:
        return (
            f"does not have {sys.executable} and {NODE} as this machine has: the project must be on"
            f" a disk that all hosts share ({message})"
        )
    return message


def _check(host: Host, answer: HostAnswer, run: Path, data: Path, data_hash: str | None) -> None:
    """Raise UserError where a host does not see what this machine sees.

    Args:
        host: The host.
        answer: Its answer.
        run: The run folder.
        data: Manifest of the dataset.
        data_hash: Its SHA-256 on this machine; None where hosts download the dataset.
    """
    if not answer["folder"]:
        raise UserError(
            f"host {host.name} has no folder {os.getcwd()}; start from a folder on a disk that all"
            " hosts see"
        )
    if not answer["mark"]:
        raise UserError(
            f"host {host.name} does not see the run folder {run} of this machine; run.dir must lie"
            " on a disk that all hosts share"
        )
    if data_hash and answer["data"] != data_hash:
        raise UserError(
            f"host {host.name} does not have the dataset {data.parent} as this machine has; put it"
            " on a disk that all hosts see, or set data.remote"
        )
    if answer["gpus"] and host.slots > answer["gpus"]:
        raise UserError(
            f"host {host.name} has {answer['gpus']} GPUs and the hostfile says slots={host.slots};"
            " give at most one rank for each GPU"
        )


def _compare_versions(answers: dict[str, HostAnswer]) -> None:
    """Raise UserError where hosts have different libraries, or some GPUs and others none."""
    for name in sorted({name for answer in answers.values() for name in answer["versions"]}):
        versions = {host: answer["versions"].get(name, "none") for host, answer in answers.items()}
        usual = Counter(versions.values()).most_common(1)[0][0]
        other = next((host for host, version in versions.items() if version != usual), None)
        if other:
            raise UserError(
                f"host {other} has {name} {versions[other]} and others have {usual}; install the"
                " same everywhere"
            )
    has_gpus = {host: bool(answer["gpus"]) for host, answer in answers.items()}
    if len(set(has_gpus.values())) > 1:
        without = next(host for host, has in has_gpus.items() if not has)
        raise UserError(
            f"host {without} has no GPU that torch sees, others have; leave it out of the hostfile"
        )
