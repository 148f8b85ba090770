"""Real Slurm on this machine, for tests: controller, node daemons and munge, own ports."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.ports import free_port

DAEMONS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol")

CONFIG = """ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=3600
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=300
KillWait=120
MpiDefault=none
SlurmdParameters=config_overrides
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 MaxTime=INFINITE State=UP GraceTime=120
PartitionName=high Nodes=ALL PriorityTier=10 MaxTime=INFINITE State=UP PreemptMode=OFF
"""


def missing() -> str | None:
    """Why this machine cannot run Slurm; None if it can."""
    if os.geteuid():
        return "a Slurm for tests needs root"
    lacking = [name for name in DAEMONS if shutil.which(name) is None]
    return f"not installed: {', '.join(lacking)} (make system-deps)" if lacking else None


@dataclass(frozen=True)
class Slurm:
    """A running cluster. variables: Environment variables of commands that use it."""

    folder: Path
    variables: dict[str, str]

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """Standard output of a Slurm command.

        Raises AssertionError with what it printed when it fails.
        """
        completed = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=os.environ | self.variables,
            cwd=cwd,
            timeout=300,
        )
        assert completed.returncode == 0, f"{command}: {completed.stdout}{completed.stderr}"
        return completed.stdout.strip()

    def submit(self, *arguments: str, cwd: Path | None = None) -> str:
        """Number of a new job."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd)

    def job(self, number: str) -> dict[str, str]:
        """Properties of a job by scontrol."""
        text = self.run("scontrol", "show", "job", number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait_for(self, number: str, *states: str, seconds: float = 600) -> dict[str, str]:
        """Wait until a job is in one of the states; returns its properties."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, (
                f"job {number} is {job['JobState']} ({job['Reason']}), not {states}; {self.logs()}"
            )
            time.sleep(0.1)
        return job

    def logs(self) -> str:
        return "\n".join(
            p.read_text(errors="replace")[-1500:] for p in sorted(self.folder.glob("slurm*.log"))
        )


@contextmanager
def slurm(folder: Path, nodes: int = 2, cpus: int = 2) -> Iterator[Slurm]:
    """Start `nodes` node daemons (n1, n2, ...), which share the CPUs; end them and their jobs."""
    folder.mkdir(parents=True)
    (folder / "state").mkdir()
    ports = [free_port() for _ in range(nodes + 1)]
    lines = [
        f"NodeName=n{i} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[i]} CPUs={cpus}"
        " RealMemory=4000"
        for i in range(1, nodes + 1)
    ]
    (folder / "slurm.conf").write_text(
        CONFIG.format(folder=folder, port=ports[0], nodes="\n".join(lines))
    )
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    variables = {"SLURM_CONF": str(folder / "slurm.conf")}
    environment = os.environ | variables
    commands = [
        [
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            f"--socket={folder}/munge.sock",
            f"--pid-file={folder}/munged.pid",
            f"--log-file={folder}/munged.log",
            f"--seed-file={folder}/munged.seed",
        ],
        ["slurmctld", "-D", "-c"],
    ]
    for i in range(1, nodes + 1):
        (folder / f"spool-n{i}").mkdir()
        commands.append(["slurmd", "-D", "-N", f"n{i}"])
    daemons = []
    cluster = Slurm(folder, variables)
    try:
        for command in commands:
            with open(folder / f"{command[0]}-{len(daemons)}.out", "w") as output:
                daemons.append(
                    subprocess.Popen(command, env=environment, stdout=output, stderr=output)
                )
            if command[0] == "munged":
                _until(lambda: (folder / "munge.sock").exists())
        _until(lambda: _idle(environment) == nodes)
        yield cluster
    finally:
        subprocess.run(
            ["scancel", "--full", "--signal=KILL", "--user=root"],
            env=environment,
            capture_output=True,
            timeout=120,
        )
        subprocess.run(
            ["scancel", "--user=root"], env=environment, capture_output=True, timeout=120
        )
        time.sleep(1)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(60)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _idle(environment: dict[str, str]) -> int:
    completed = subprocess.run(
        ["sinfo", "-h", "-N", "-p", "low", "-t", "idle", "-o", "%N"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return len(completed.stdout.split())


def _until(condition, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "Slurm does not start"
        time.sleep(0.1)
