"""`nextpt kernels`, and what `nextpt doctor` says of earlier trials."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kernels.attention.trial import AttentionShape
from kernels.cross_entropy.trial import LossShape
from kernels.trials import Trial
from launcher.cli import app
from launcher.doctor.finding import Status
from launcher.doctor.kernels import examine_kernels
from nextpt.job.kernel_cache import remember
from nextpt.train import kernel_choice

ARGUMENTS = ["kernels", "--config", "configs/demo.yaml", "--device", "cpu"]


def try_all(
    operator: str,
    names: list[str],
    shape: AttentionShape | LossShape,
    device: str,
    seconds: float,
) -> list[Trial]:
    """What would be tried, without trying it."""
    assert (device, seconds) == ("cpu", 180.0)
    if isinstance(shape, LossShape):
        assert (operator, names) == ("cross_entropy", ["torch", "triton"])
        assert (shape.tokens, shape.width, shape.vocab_size) == (1024, 128, 4096)
        return [Trial("torch", 7.0, 1e-7), Trial("triton", reason="it fails: X: y")]
    # Tests interpret Triton's kernels
    assert (operator, names) == ("attention", ["sdpa", "triton"])
    assert (shape.rows, shape.length, shape.heads, shape.windows) == (4, 256, 4, ((None, 4),))
    assert shape.documents[0] == 0 and shape.documents[-1] == 4 * 256
    return [Trial("sdpa", 12.5, 1e-6), Trial("triton", 99.0, 1e-6)]


def test_table_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_choice, "try_all", try_all)
    result = CliRunner().invoke(app, ARGUMENTS)
    assert result.exit_code == 0, result.output
    assert "attention, a micro-batch on" in result.output
    assert "sdpa" in result.output and "12.5" in result.output and "1.0e-06" in result.output
    assert "reference: it writes out all scores" in result.output
    assert "chosen: sdpa" in result.output
    assert "triton: it fails: X: y" in result.output
    assert result.output.rstrip().endswith("chosen: torch")


def test_json_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_choice, "try_all", try_all)
    result = json.loads(CliRunner().invoke(app, [*ARGUMENTS, "--json"]).output)
    attention = result["attention"]
    assert attention["chosen"] == "sdpa" and attention["shape"]["head_dim"] == 32
    assert result["cross_entropy"]["chosen"] == "torch"
    trials = {trial["name"]: trial for trial in attention["trials"]}
    assert trials["sdpa"]["milliseconds"] == 12.5
    assert "does not run on cpu" in trials["flex"]["reason"]


def test_a_device_that_is_not_there_is_a_user_error() -> None:
    for device in ("tpu", "cuda"):
        result = CliRunner().invoke(app, [*ARGUMENTS[:-1], device])
        assert result.exit_code == 2 and f"--device {device}: expected cpu" in result.output


def remember_trials(
    path: Path, key: str, device: str, trials: list[Trial], operator: str = "attention"
) -> None:
    listed = [trial._asdict() for trial in trials]
    remember(path, key, {"operator": operator, "device": device, "trials": listed})


def test_doctor_shows_the_newest_trials(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    assert examine_kernels(path) == []
    flex, triton = Trial("flex", 2.0, 0.001), Trial("triton", reason="it fails: X: y")
    for key, device, trials in (("a", "A100", [flex]), ("b", "H200", [triton, flex])):
        remember_trials(path, key, device, trials)
    (finding,) = examine_kernels(path)
    assert finding.status == Status.OK
    assert finding.observed.startswith("flex 2 ms; triton: it fails: X: y (on H200, 20")
    remember_trials(path, "c", "B200", [triton])
    (finding,) = examine_kernels(path)
    assert finding.status == Status.NOTE and "no trial succeeded on B200" in finding.observed
    loss = Trial("torch", 1.0, 0.0)
    remember_trials(path, "d", "H200", [loss], operator="cross_entropy")
    assert [finding.subject for finding in examine_kernels(path)] == ["attention", "cross_entropy"]
    remember(path, "e", {"operator": "attention", "device": "B200", "trials": [{"name": "flex"}]})
    (finding,) = examine_kernels(path)
    assert "are unreadable" in finding.observed
