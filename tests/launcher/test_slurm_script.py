"""The job script: its syntax, what it refuses, and the environment it gives each task (a stand-in for srun, no Slurm)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "launcher" / "slurm" / "train.sbatch"


def run(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"SLURM_SUBMIT_DIR": str(tmp_path)} | environment)


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, "nowhere.yaml")
    assert done.returncode == 2 and "nowhere.yaml" in done.stderr and "usage" in done.stderr


def test_a_missing_python_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("")
    done = run(tmp_path, "a.yaml")
    assert done.returncode == 2 and "make setup" in done.stderr


def test_each_task_learns_its_rank_and_the_meeting_point(tmp_path: Path) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in {
        "scontrol": 'echo node7; echo node8',
        "srun": 'shift; SLURM_PROCID=5 SLURM_LOCALID=1 SLURM_NTASKS=8 SLURM_NNODES=2 exec "$@"',
        "python": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_SIZE $MASTER_ADDR $MASTER_PORT $*"',
    }.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (commands / name).chmod(0o755)
    (tmp_path / "a.yaml").write_text("")
    done = run(tmp_path, "a.yaml", "run.name=x y", PYTHON=str(commands / "python"), PATH=f"{commands}:{os.environ['PATH']}",
               SLURM_JOB_ID="123456", SLURM_JOB_NODELIST="node[7-8]")
    assert done.stdout == f"5 1 8 4 node7 {10000 + 123456 % 20000} launcher/run.py --config a.yaml run.name=x y\n", done.stderr
