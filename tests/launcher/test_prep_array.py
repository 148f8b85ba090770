"""Preparation by a job array: the script, its refusals, tasks that divide the work (no Slurm)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.prep_worlds import content, prepare, world

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launcher" / "slurm" / "prep_array.sbatch"


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    variables = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "PYTHON": sys.executable,
        "SLURM_CPUS_PER_TASK": "1",
    }
    return subprocess.Popen(
        ["bash", str(SCRIPT), *arguments],
        env=os.environ | variables | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_refusals() -> None:
    task = start()
    assert "usage" in task.communicate()[1] and task.returncode == 2
    task = start("a=b")
    assert "sbatch --array" in task.communicate()[1] and task.returncode != 0
    task = start("a=b", SLURM_ARRAY_TASK_ID="0", PYTHON="/nowhere")
    assert "make setup" in task.communicate()[1] and task.returncode == 2


def test_tasks_of_an_array_make_one_dataset(tmp_path: Path) -> None:
    spec = world(tmp_path, 60)
    arguments = [
        *(f"{name}={path}" for name, path in spec.domains.items()),
        "--sequence-length",
        "64",
        "--validation-fraction",
        "0.2",
        "--tokenizer",
        str(spec.tokenizer),
        "--output",
        str(tmp_path / "by_array"),
    ]
    tasks = [
        start(*arguments, SLURM_ARRAY_TASK_ID=str(i), SLURM_ARRAY_TASK_COUNT="2") for i in (7, 12)
    ]
    for task in tasks:
        out, errors = task.communicate(timeout=600)
        assert task.returncode == 0, errors
        assert "validation" in out and "report" in out
    prepare(spec)
    assert content(tmp_path / "by_array") == content(spec.output)
