"""The demo with a training of seconds: its check of resume, and its check against zlib."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_demo_with_a_short_training(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    config["train"] |= {"steps": 60}
    config["model"] |= {"depth": 1, "width": 32, "heads": 2}
    config["schedule"] |= {"warmup": 5, "decay": 10}
    config["checkpoint"] |= {"every_steps": 30}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(config))
    script = (
        "import launcher.cli as c, launcher.demo as d, pathlib, sys; d.CONFIG ="
        f" pathlib.Path({str(tmp_path / 'short.yaml')!r}); sys.argv = ['nextpt', 'demo']; c.main()"
    )

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=1500,
            env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"},
        )

    first = run()
    assert (
        first.returncode == 2 and "the model is worse than zlib in code, prose" in first.stderr
    ), first.stderr[-2000:]
    assert first.stdout.count("identical") == 4 and "DIFFERENT" not in first.stdout
    assert all(
        line in first.stdout
        for line in ("training a tokenizer", "packing", "step 60/60", "xz -9e", "perplexity")
    )
    assert {p.name for p in tmp_path.iterdir()} == {"short.yaml", "data", "runs"}
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"demo"}
    second = run()
    assert (
        "made from the same inputs" in second.stdout and "is complete at step 60" in second.stdout
    )
    assert second.stdout.count("identical") == 4
    assert (
        "exists and is complete (step 60)" in second.stdout
        and "To start again from nothing: rm -r runs/demo data/demo" in second.stdout
    )
    assert "=== 5/7" in second.stdout and "evaluating code: done" in second.stdout
