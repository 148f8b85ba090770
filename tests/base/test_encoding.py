"""Encoding: paths that are not ASCII work in any locale."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAME = "r\u00e9sum\u00e9-\u4f60"


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """A program of the repository in the C locale, with Python's UTF-8 mode off."""
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"} | variables
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=300)


@pytest.mark.process
def test_the_command_line_and_ranks_read_and_print_such_paths(tmp_path: Path) -> None:
    folder = tmp_path / NAME
    folder.mkdir()
    config = folder / "c.yaml"
    config.write_bytes((ROOT / "configs" / "demo.yaml").read_bytes())
    shown = run("-m", "launcher.cli", "config", "show", str(config), f"run.dir={folder}/run")
    assert shown.returncode == 0, shown.stderr.decode()
    assert f"dir: {folder}/run" in shown.stdout.decode()
    rank = run("launcher/run.py", "--config", f"{folder}/none.yaml")
    assert rank.returncode == 2 and rank.stderr.decode().count("\n") == 1
    assert rank.stderr.decode().startswith(f"error: config file {folder}/none.yaml does not")


@pytest.mark.process
def test_a_terminal_that_cannot_show_a_character_ends_nothing() -> None:
    source = "from nextpt.base.encoding import ensure_utf8; ensure_utf8(); print('a\\u4f60')"
    for variables in ({"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1:strict"}):
        shown = run("-c", source, **variables)
        assert (shown.returncode, shown.stdout) == (0, b"a\\u4f60\n"), shown.stderr.decode()
