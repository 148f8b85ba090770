"""Sixty kills, many of them in saves: the invariants of support/storm.py hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def storm(folder: Path, *arguments: str) -> dict:
    completed = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.support.storm",
            "--json",
            str(folder / "storm.json"),
            *arguments,
        ],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=3500,
    )
    assert completed.returncode == 0, completed.stdout[-2000:] + completed.stderr[-6000:]
    return json.loads((folder / "storm.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_sixty_kills_change_nothing(tmp_path: Path) -> None:
    summary = storm(tmp_path, "--kills", "64", "--launchers", "2")
    assert (
        summary["kills"] == 66
        and summary["inside_saves"] >= 24
        and summary["inside_background_saves"] >= 8
    )
    assert (
        set(summary["by_stage"]) == {"0", "1", "2", "3"} and min(summary["by_stage"].values()) >= 4
    )
    assert summary["by_victims"]["one"] >= 3 and summary["by_victims"]["all"] >= 23
    assert not any(summary["left_behind"].values())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_kill_of_every_case_changes_nothing_with_muon(tmp_path: Path) -> None:
    summary = storm(tmp_path, "--kills", "14", "--launchers", "0", "--optimizer", "muon")
    assert summary["kills"] == 14 and set(summary["by_stage"]) == {"0", "1", "2", "3"}
    assert not any(summary["left_behind"].values())
