"""Benchmarks of recipes: which runs they train, and what they conclude. No run is trained."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench import lr_transfer, optimizer_steps
from nextpt.config import load_config

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "shakespeare_char.yaml"
DEMO = ROOT / "configs" / "demo.yaml"


def test_rates_are_compared_by_their_mean_over_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lowest rate falls with the width under standard alone, and one seed of one run fails."""
    trained: dict[str, list[str]] = {}

    def train(config: Path, folder: Path, overrides: Sequence[str]) -> float:
        run = load_config(config, overrides)
        assert folder.name not in trained or trained[folder.name] == [*overrides]
        trained[folder.name] = [*overrides]
        model = run.model
        width = model.width if model.parametrization == "standard" else 32
        best = 4e-3 * 32 / width
        noise = 0.3 if run.run.seed == 5 else -0.3
        if (model.width, run.optimizer.lr, run.run.seed) == (64, 8e-3, 5):
            return math.inf
        return 2.0 + math.log2(run.optimizer.lr / best) ** 2 + noise

    monkeypatch.setattr(lr_transfer, "train", train)
    arguments = [str(CONFIG), "optimizer.kind=adamw", "model.ffn_width=null", "--axis", "width"]
    arguments += ["--sizes", "32,64,128", "--rates", "1e-3,2e-3,4e-3,8e-3", "--seeds", "1337,5"]
    files = tmp_path / "result.json", tmp_path / "plot.svg"
    arguments += ["--json", str(files[0]), "--plot", str(files[1]), "--dir", str(tmp_path / "runs")]
    monkeypatch.setattr("sys.argv", ["lr_transfer", *arguments])
    lr_transfer.main()
    runs = json.loads(files[0].read_text())["runs"]
    assert len(runs) == 2 * 3 * 4 and files[1].stat().st_size
    lowest = {
        (kind, size): min(
            (r for r in runs if (r["parametrization"], r["size"]) == (kind, size)),
            key=lambda r: sum(r["losses"]),
        )["lr"]
        for kind in ("standard", "mup")
        for size in (32, 64, 128)
    }
    assert lowest == {
        ("standard", 32): 4e-3,
        ("standard", 64): 2e-3,
        ("standard", 128): 1e-3,
        ("mup", 32): 4e-3,
        ("mup", 64): 4e-3,
        ("mup", 128): 4e-3,
    }
    # The base shape is trained once for both, and its own seed has the name of before
    assert not any(name.startswith("mup-width-32") for name in trained)
    assert {"standard-width-32-lr-4e-3", "mup-width-64-lr-4e-3-seed-5"} <= trained.keys()
    assert "model.heads=4" in trained["mup-width-128-lr-1e-3"]
    assert "2.000*" in capsys.readouterr().out


def test_steps_for_a_loss_are_interpolated_over_their_logarithm() -> None:
    steps, losses = [100, 200, 400], [3.0, 2.5, 2.0]
    assert optimizer_steps.steps_for(2.5, steps, losses) == pytest.approx(200)
    assert optimizer_steps.steps_for(2.25, steps, losses) == pytest.approx(math.sqrt(200 * 400))
    for outside in (3.1, 1.9):
        assert math.isnan(optimizer_steps.steps_for(outside, steps, losses))


def test_ratios_are_averaged_as_logarithms_with_an_interval() -> None:
    assert optimizer_steps.summarize([2.0]) == {"ratio": pytest.approx(2.0)}
    summary = optimizer_steps.summarize([1.0, 2.0, 4.0])
    assert summary["ratio"] == pytest.approx(2.0)
    # t of 2 degrees of freedom is 4.303, the standard error ln 2 / sqrt(3)
    width = 4.302653 * math.log(2) / math.sqrt(3)
    assert summary["low"] == pytest.approx(2 * math.exp(-width))
    assert summary["high"] == pytest.approx(2 * math.exp(width))


def test_both_optimizers_are_tuned_alike_and_muon_is_shortened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Muon needs half of the steps, at its own best rate."""
    lengths: dict[str, tuple[int, int, int]] = {}

    def train(config: Path, folder: Path, overrides: Sequence[str]) -> float:
        run = load_config(config, overrides)
        kind, rate, steps = run.optimizer.kind, run.optimizer.lr, run.total_steps
        lengths[folder.name] = steps, run.schedule.warmup, run.schedule.decay or 0
        best, factor = (2e-3, 1) if kind == "adamw" else (8e-3, 2)
        return 3.0 + abs(math.log(rate / best)) - math.log(factor * steps / 1200)

    monkeypatch.setattr(optimizer_steps, "train", train)
    runs = optimizer_steps.Runs(DEMO, [], tmp_path)
    result = optimizer_steps.measure(runs, ["2e-3", "8e-3"], ["0", "1"], [0.4, 0.5, 0.6])
    assert result["best"] == {"adamw": "2e-3", "muon": "8e-3"}
    assert result["ratio"] == pytest.approx(2.0) and len(result["seeds"]) == 2
    assert lengths["muon-lr-8e-3-steps-600-seed-1"] == (600, 20, 270)
    optimizer_steps.show(result)
