"""Which hosts a training runs on: the hostfile, the environment file of deepspeed, and what is looked at before anything starts."""

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
from typing import Any

from nextpt.base.errors import ConfigError, UserError
from nextpt.base.files import sha256_file
from nextpt.config import Config

NODE = Path(__file__).resolve().parent / "node.py"
# No question may be asked, and a connection without an answer for 15 s is lost.
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
    """A line of a hostfile. name: as ssh knows it. slots: ranks on it."""

    name: str
    slots: int


class Unreachable(UserError):
    """A host that does not answer. hosts: all of them."""

    def __init__(self, message: str, hosts: list[Host]) -> None:
        super().__init__(message)
        self.hosts = hosts


def read_hostfile(path: Path) -> list[Host]:
    """Hosts of a file with lines `NAME slots=N`.

    Empty lines and those that begin with # are left out. Raises ConfigError.

    Stricter than deepspeed, which hands names on to shells and takes a file that is not there for
    one machine.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
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
                f"hostfile {path}, line {number}: host {match['name']} is there twice; give it one"
                " line with all its slots"
            )
        hosts.append(Host(match["name"], int(match["slots"])))
    if not hosts:
        raise ConfigError(
            f"hostfile {path} names no host; it needs lines of the form `NAME slots=N`"
        )
    return hosts


def exported_variables() -> dict[str, str]:
    """Variables of ~/.deepspeed_env and ./.deepspeed_env, where people keep what all hosts are to have. Raises ConfigError.

    deepspeed pastes their values into a shell command on every host: one that a shell would act
    upon is refused here.
    """
    found: dict[str, str] = {}
    for path in (Path.home() / ".deepspeed_env", Path(".deepspeed_env")):
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            if not _VARIABLE.fullmatch(line.strip()):
                raise ConfigError(
                    f"{path}, line {number}: {line.strip()!r} is not NAME=value with a value of"
                    " letters, digits and @%+=:,./~_-; deepspeed would give it to a shell on every"
                    " host"
                )
            name, _, value = line.strip().partition("=")
            found[name] = value
    return found


def ssh_command(ssh: str, host: Host) -> list[str]:
    """The command that starts launcher/jobs/node.py on a host.

    What it is to do goes through its standard input.
    """
    return [
        *shlex.split(ssh),
        *SSH_OPTIONS,
        host.name,
        f"exec {shlex.quote(sys.executable)} -u {shlex.quote(str(NODE))}",
    ]


def probe(hosts: list[Host], ssh: str, config: Config) -> dict[str, dict[str, Any]]:
    """What each host says of itself (node.py, `look`), after all agree.

    Raises Unreachable, or UserError naming host and difference.
    """
    run = config.run_dir.resolve()
    data = Path(config.data.path).resolve() / "dataset.json"
    with _mark(run) as mark:
        request = {
            "action": "look",
            "folder": os.getcwd(),
            "mark": str(mark),
            "data": None if config.data.remote else str(data),
        }
        with ThreadPoolExecutor(min(len(hosts), 32)) as threads:
            answers = dict(
                zip(
                    (h.name for h in hosts),
                    threads.map(lambda host: _ask(ssh, host, request), hosts),
                    strict=True,
                )
            )
    silent = [host for host in hosts if isinstance(answers[host.name], str)]
    if silent:
        raise Unreachable(
            "; ".join(f"host {host.name}: {answers[host.name]}" for host in silent), silent
        )
    wanted = sha256_file(data) if data.is_file() else None
    for host in hosts:
        _check(host, answers[host.name], run, data, None if config.data.remote else wanted)
    _compare_versions(answers)
    return answers


@contextmanager
def _mark(run: Path) -> Iterator[Path]:
    """A file in the run folder that every host must see."""
    run.mkdir(parents=True, exist_ok=True)
    mark = run / f".shared-{secrets.token_hex(8)}"
    mark.touch()
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)


def _ask(ssh: str, host: Host, request: dict[str, Any]) -> dict[str, Any] | str:
    """The answer of a host, or what is wrong."""
    try:
        done = subprocess.run(
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
    if done.returncode == 0 and done.stdout.strip():
        return json.loads(done.stdout.strip().splitlines()[-1])
    said = " ".join(done.stderr.split())[-300:] or f"ended with {done.returncode}"
    if done.returncode == 255:
        return f"not reachable by ssh without a password ({said})"
    if done.returncode in (126, 127) or "No such file" in said or "can't open file" in said:
        return (
            f"does not have {sys.executable} and {NODE} as this machine has: the project must lie"
            f" on a disk that all hosts see ({said})"
        )
    return said


def _check(host: Host, answer: dict[str, Any], run: Path, data: Path, wanted: str | None) -> None:
    """Raises UserError. wanted: hash of the dataset's manifest here.

    None where hosts fetch it from elsewhere.
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
    if wanted and answer["data"] != wanted:
        raise UserError(
            f"host {host.name} does not have the dataset {data.parent} as this machine has; put it"
            " on a disk that all hosts see, or give data.remote"
        )
    if answer["gpus"] and host.slots > answer["gpus"]:
        raise UserError(
            f"host {host.name} has {answer['gpus']} GPUs and the hostfile says slots={host.slots};"
            " give at most one rank for each GPU"
        )


def _compare_versions(answers: dict[str, dict[str, Any]]) -> None:
    for name in sorted({name for answer in answers.values() for name in answer["versions"]}):
        found = {host: answer["versions"].get(name, "none") for host, answer in answers.items()}
        usual = Counter(found.values()).most_common(1)[0][0]
        other = next((host for host, version in found.items() if version != usual), None)
        if other:
            raise UserError(
                f"host {other} has {name} {found[other]} and others have {usual}; install the same"
                " everywhere"
            )
    kinds = {host: bool(answer["gpus"]) for host, answer in answers.items()}
    if len(set(kinds.values())) > 1:
        raise UserError(
            f"host {next(h for h, has in kinds.items() if not has)} has no GPU that torch sees,"
            " others have; leave it out of the hostfile"
        )
