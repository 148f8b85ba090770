"""The job script: syntax, refusals, and the environment of each task (a stand-in for srun)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

SCRIPT = Path(__file__).resolve().parents[2] / "launcher" / "slurm" / "train.sbatch"


def run(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"SLURM_SUBMIT_DIR": str(tmp_path)} | environment,
    )


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    completed = run(tmp_path, "nowhere.yaml")
    assert (
        completed.returncode == 2
        and "nowhere.yaml" in completed.stderr
        and "usage" in completed.stderr
    )


def test_a_missing_python_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("")
    completed = run(tmp_path, "a.yaml")
    assert completed.returncode == 2 and "make setup" in completed.stderr


@pytest.mark.parametrize(
    ("code", "state", "restarts", "queued"),
    [
        (75, "RUNNING", "0", True),
        (76, "RUNNING", "0", True),
        (0, "RUNNING", "0", False),
        (2, "RUNNING", "0", False),
        (75, "COMPLETING", "0", False),
        (76, "RUNNING", "10", False),
        (75, "RUNNING", "40", True),
        (137, "RUNNING", "3", True),
        (137, "RUNNING", "10", False),
        (1, "RUNNING", "0", False),
    ],
)
def test_a_signalled_job_queues_itself_again(
    tmp_path: Path, code: int, state: str, restarts: str, queued: bool
) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    requeues = tmp_path / "requeues"
    for name, body in {
        "scontrol": (
            f'case "$1" in show) echo "node7 JobState={state} x";;'
            f' *) echo "$*" >> {requeues};; esac'
        ),
        # A signal to the script while the ranks save must not end it.
        "srun": f"kill -USR1 $PPID; kill -TERM $PPID; sleep 0.2; exit {code}",
    }.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (commands / name).chmod(0o755)
    (tmp_path / "a.yaml").write_text("")
    completed = run(
        tmp_path,
        "a.yaml",
        PYTHON="/bin/true",
        PATH=f"{commands}:{os.environ['PATH']}",
        SLURM_JOB_ID="12",
        SLURM_JOB_NODELIST="node7",
        SLURM_RESTART_COUNT=restarts,
    )
    assert completed.returncode == code, completed.stderr
    assert requeues.exists() == queued and (not queued or requeues.read_text() == "requeue 12\n")


def test_each_task_learns_its_rank_and_the_meeting_point(tmp_path: Path) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in {
        "scontrol": "echo node7; echo node8",
        "srun": 'shift; SLURM_PROCID=5 SLURM_LOCALID=1 SLURM_NTASKS=8 SLURM_NNODES=2 exec "$@"',
        "python": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_SIZE $MASTER_ADDR $MASTER_PORT $*"',
    }.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (commands / name).chmod(0o755)
    (tmp_path / "a.yaml").write_text("")
    completed = run(
        tmp_path,
        "a.yaml",
        "run.name=x y",
        PYTHON=str(commands / "python"),
        PATH=f"{commands}:{os.environ['PATH']}",
        SLURM_JOB_ID="123456",
        SLURM_JOB_NODELIST="node[7-8]",
    )
    assert (
        completed.stdout
        == f"5 1 8 4 node7 {10000 + 123456 % 20000} {tmp_path}/launcher/run.py --config a.yaml"
        " run.name=x y\n"
    ), completed.stderr
