"""Start-up of the command line: no help text imports a heavy module (bench/startup.py measures)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "torch",
    "deepspeed",
    "pyarrow",
    "scipy",
    "matplotlib",
    "pydantic",
    "omegaconf",
    "numpy",
    "transformers",
    "streaming",
    "tokenizers",
    "fsspec",
    "jinja2",
    "humanize",
    "psutil",
)
# Prints every help text in one process, whose modules are those that any of them imports.
SCRIPT = """
import contextlib, io, json, sys
from bench.startup import command_paths
from launcher.cli import main
shown = {}
for path in command_paths():
    sys.argv = ["nextpt", *path, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        main()
    shown[" ".join(path)] = [output.getvalue(), sorted(sys.modules)]
print(json.dumps(shown))
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, tuple[str, list[str]]]:
    completed = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert completed.returncode == 0, completed.stderr
    return json.loads(completed.stdout)


def test_every_command_has_a_help_text(helps: dict[str, tuple[str, list[str]]]) -> None:
    for command, (text, _) in helps.items():
        assert f"Usage: nextpt {command}" in text
    assert len(helps) > 40 and {"", "train", "eval", "scaling fit", "prep shards"} <= helps.keys()


def test_no_help_text_imports_a_heavy_module(
    helps: dict[str, tuple[str, list[str]]],
) -> None:
    for command, (_, modules) in helps.items():
        heavy = {module.partition(".")[0] for module in modules} & set(HEAVY)
        assert not heavy, f"nextpt {command} --help imports {', '.join(sorted(heavy))}"
