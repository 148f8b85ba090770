"""`nextpt kernels`, and what `nextpt doctor` says of earlier trials."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kernels.trials import AttentionShape, Trial
from launcher.cli import app
from launcher.doctor.finding import Status
from launcher.doctor.kernels import examine_kernels
from nextpt.job.kernel_cache import remember
from nextpt.train import kernel_choice

ARGUMENTS = ["kernels", "--config", "configs/demo.yaml", "--device", "cpu"]


def try_all(names: list[str], shape: AttentionShape, device: str, seconds: float) -> list[Trial]:
    """What would be tried, without trying it."""
    # Tests interpret Triton's kernels
    assert (names, device, seconds) == (["sdpa", "triton"], "cpu", 180.0)
    assert (shape.rows, shape.length, shape.heads, shape.windows) == (4, 256, 4, ((None, 4),))
    assert shape.documents[0] == 0 and shape.documents[-1] == 4 * 256
    return [Trial("sdpa", 12.5, 1e-6), Trial("triton", 99.0, 1e-6)]


def test_table_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_choice, "try_all", try_all)
    result = CliRunner().invoke(app, ARGUMENTS)
    assert result.exit_code == 0, result.output
    assert "attention of 4 x 256 packed tokens" in result.output
    assert "sdpa" in result.output and "12.5" in result.output and "1.0e-06" in result.output
    assert "reference: it writes out all scores" in result.output
    assert result.output.rstrip().endswith("chosen: sdpa")


def test_json_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_choice, "try_all", try_all)
    result = json.loads(CliRunner().invoke(app, [*ARGUMENTS, "--json"]).output)
    assert result["chosen"] == "sdpa" and result["shape"]["head_dim"] == 32
    trials = {trial["name"]: trial for trial in result["trials"]}
    assert trials["sdpa"]["milliseconds"] == 12.5
    assert "does not run on cpu" in trials["flex"]["reason"]


def test_a_device_that_is_not_there_is_a_user_error() -> None:
    for device in ("tpu", "cuda"):
        result = CliRunner().invoke(app, [*ARGUMENTS[:-1], device])
        assert result.exit_code == 2 and f"--device {device}: expected cpu" in result.output


def test_doctor_shows_the_newest_trials(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    assert examine_kernels(path) == []
    flex, triton = Trial("flex", 2.0, 0.001), Trial("triton", reason="it fails: X: y")
    for key, device, trials in (("a", "A100", [flex]), ("b", "H200", [triton, flex])):
        remember(path, key, {"device": device, "trials": [t._asdict() for t in trials]})
    (finding,) = examine_kernels(path)
    assert finding.status == Status.OK
    assert finding.observed.startswith("flex 2 ms; triton: it fails: X: y (on H200, 20")
    remember(path, "c", {"device": "B200", "trials": [triton._asdict()]})
    (finding,) = examine_kernels(path)
    assert finding.status == Status.NOTE and "no trial succeeded on B200" in finding.observed
    remember(path, "d", {"device": "B200", "trials": [{"name": "flex"}]})
    (finding,) = examine_kernels(path)
    assert "are unreadable" in finding.observed
