"""Starting on CPUs runs no compiler."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nextpt.config import to_yaml
from nextpt.events import read_events
from tests.support.datasets import tiny
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc", "x86_64-linux-gnu-gcc")


def test_a_start_on_cpus_runs_no_compiler(dataset: Path, tmp_path: Path) -> None:
    """DeepSpeed compiles a test program for each op that it asks about."""
    programs, log = tmp_path / "programs", tmp_path / "calls"
    programs.mkdir()
    for name in COMPILERS:
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {log}\nexit 1\n')
        (programs / name).chmod(0o755)
    config = tiny(dataset, tmp_path / "run", train={"steps": 2, "zero_stage": 2})
    (tmp_path / "tiny.yaml").write_text(to_yaml(config))
    run_ranks(
        [str(ROOT / "launcher" / "run.py"), "--config", str(tmp_path / "tiny.yaml")],
        2,
        tmp_path / "logs",
        PATH=f"{programs}{os.pathsep}{os.environ['PATH']}",
    )
    assert len(read_events(tmp_path / "run" / "metrics.jsonl", "train")) > 0
    assert not log.exists(), log.read_text()
