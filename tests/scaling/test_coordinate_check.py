"""Coordinate check: activations change alike under muP and CompleteP, and not without."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from launcher.cli import app
from nextpt.base.errors import ScalingError
from nextpt.config import Config, to_yaml
from nextpt.scaling.coordinate_check import (
    JUDGED,
    Measurement,
    Sweep,
    default_widths,
    first_batch,
    random_batch,
    sweep,
)
from nextpt.scaling.shapes import with_depth, with_width
from tests.support.datasets import tiny

BASE = {
    "width": 32,
    "heads": 2,
    "kv_heads": None,
    "base_width": 32,
    "base_depth": 2,
    "vocab_size": 128,
}
SPECTRAL = {"kind": "muon", "muon": {"scale": "spectral", "lr": 0.02}}
RMS = {"kind": "muon", "muon": {"scale": "match_rms_adamw"}}
STEPS = 5


def config_of(optimizer: dict[str, Any] | None = None, **model: Any) -> Config:
    section = {"lr": 7e-3} | (optimizer or {})
    return tiny(Path("none"), Path("none"), model=BASE | model, optimizer=section)


def over_widths(config: Config) -> Sweep:
    batch = random_batch(config, 4)
    return sweep(config, "width", [32, 64, 128], steps=STEPS, seeds=2, batch=batch)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["mup", "completep"])
@pytest.mark.parametrize("optimizer", [{}, SPECTRAL, RMS], ids=["adamw", "spectral", "rms"])
@pytest.mark.parametrize("tied", [False, True])
def test_activations_change_alike_at_all_widths(
    kind: str, optimizer: dict[str, Any], tied: bool
) -> None:
    result = over_widths(config_of(optimizer, parametrization=kind, tied_embeddings=tied))
    for place in result.places:
        slope = result.slope(place, STEPS)
        assert slope <= 0.2 and (place == "logits" or slope >= -0.2), place
    assert result.is_stable


@pytest.mark.thorough
def test_activations_change_more_in_wider_models_without_rules() -> None:
    result = over_widths(config_of())
    assert result.slope("last_block", STEPS) > 0.5 and result.slope("logits", STEPS) > 0.5
    assert result.growing == ["last_block", "logits"] and not result.is_stable


@pytest.mark.thorough
def test_a_rule_that_is_left_out_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    from nextpt.model import Parametrization
    from nextpt.model.parametrization import Factors

    monkeypatch.setattr(Parametrization, "adamw", lambda rules, role: Factors())
    assert "last_block" in over_widths(config_of(parametrization="mup")).growing


@pytest.mark.thorough
@pytest.mark.parametrize(("kind", "is_stable"), [("mup", False), ("completep", True)])
def test_completep_makes_changes_alike_at_all_depths(kind: str, is_stable: bool) -> None:
    config = config_of(parametrization=kind)
    batch = random_batch(config, 4)
    result = sweep(config, "depth", [2, 4, 8], steps=STEPS, seeds=2, batch=batch)
    assert result.is_stable == is_stable
    assert (abs(result.slope("last_block", STEPS)) <= 0.1) == is_stable


def measurement(width: int, seed: int, change: float) -> Measurement:
    sizes = {place: [1.0] + [change] * 3 for place in JUDGED}
    return Measurement(width, 2, seed, [1.0] * 4, sizes, sizes, {"output": [1.0] * 3})


def test_slopes_are_those_of_logarithms_over_seeds() -> None:
    changes = {(10, 0): 1.0, (10, 1): 4.0, (40, 0): 2.0, (40, 1): 8.0}
    result = Sweep("width", tuple(measurement(*key, change) for key, change in changes.items()))
    assert result.mean("changes", "logits", 3, 10) == pytest.approx(2.0)
    assert result.slope("logits", 3) == result.judged_slope("logits") == pytest.approx(0.5)
    assert result.growing == [*JUDGED] and result.shrinking == []


@pytest.mark.parametrize(
    ("second", "growing", "shrinking"),
    [
        (math.nan, [*JUDGED], []),
        (math.inf, [*JUDGED], []),
        (1.1, [], []),
        (0.5, [], ["last_block", "final_norm"]),
    ],
)
def test_the_verdict(second: float, growing: list[str], shrinking: list[str]) -> None:
    result = Sweep("width", (measurement(8, 0, 1.0), measurement(16, 0, second)))
    assert (result.growing, result.shrinking) == (growing, shrinking)
    assert "NaN" not in json.dumps(result.to_json())


def test_widths_are_numbers_of_heads() -> None:
    config = config_of(heads=4, kv_heads=2, ffn_width=96)  # heads of 8
    assert default_widths(config) == [16, 32, 64, 128]
    model = with_width(config, 128).model
    assert (model.heads, model.kv_heads, model.head_dim, model.ffn_width) == (16, 8, 8, 384)
    assert with_depth(config, 5).model == config.model.model_copy(update={"depth": 5})
    with pytest.raises(ScalingError, match="--widths 24 is not a multiple of 16"):
        with_width(config, 24)


def test_the_batch_is_the_runs_first(dataset: Path, tmp_path: Path) -> None:
    config = tiny(dataset, tmp_path)
    batch = first_batch(config, 3)
    assert batch.tokens.shape == (3, 64)
    assert torch.equal(batch.tokens, first_batch(config, 5).tokens[:3])


@pytest.mark.thorough
def test_the_command_prints_a_table_and_writes_both_files(dataset: Path, tmp_path: Path) -> None:
    config = tiny(dataset, tmp_path, model={"base_width": 16, "base_depth": 2})
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    arguments = ["coordinate-check", str(tmp_path / "run.yaml"), "model.parametrization=completep"]
    sizes = ["--widths", "16,32", "--depths", "1,2", "--steps", "3", "--seeds", "1"]
    files = ["--json", str(tmp_path / "check.json"), "--plot", str(tmp_path / "check.png")]
    result = CliRunner().invoke(app, [*arguments, *sizes, *files])
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    for text in ("activations", "last_block", "update of attention", "slope, step 3"):
        assert text in words
    assert words.count("mean slopes from step 3 on are last_block ") == 2
    written = json.loads((tmp_path / "check.json").read_text())
    assert [s["axis"] for s in written["sweeps"]] == ["width", "depth"]
    assert written["sweeps"][0]["measurements"][0]["losses"]
    assert (tmp_path / "check.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--widths", "32,x"], "--widths 32,x: expected whole numbers above 0"),
        (["--widths", "32", "--random-tokens"], "--widths 32: a slope needs two or more"),
        (["--widths", "32,33", "--random-tokens"], "--widths 33 is not a multiple of"),
        ([], "without a dataset use --random-tokens"),
        (["--plot", "check.txt"], "check.txt must end in .png"),
    ],
)
def test_errors_say_what_to_do(arguments: list[str], message: str, tmp_path: Path) -> None:
    config = tiny(tmp_path / "nothing", tmp_path)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    command = ["coordinate-check", str(tmp_path / "run.yaml"), *arguments]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and message in result.output, result.output
