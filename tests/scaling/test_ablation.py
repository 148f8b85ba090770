"""Ablations: pairs of documents, seeds, mistakes, and a whole tiny one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from launcher.cli import app
from nextpt.config import to_yaml
from nextpt.observe.ablation_picture import draw_ablation
from nextpt.scaling.ablation import Ablation, compare, load_ablation, score_run
from tests.support.datasets import tiny
from tests.support.runs import make_run

ROOT = Path(__file__).resolve().parents[2]
TEXTS = {"code": ["def f(): pass\n" * n for n in (1, 3, 8)], "prose": ["Whan that Aprille\n" * n for n in (2, 5)]}


def write(folder: Path, data: Path, **changes: Any) -> Path:
    (folder / "base.yaml").write_text(to_yaml(tiny(data, folder)))
    values = {"base": "base.yaml", "dir": str(folder / "out"), "seeds": [0, 1], "baseline": {"name": "even", "overrides": []},
              "variants": [{"name": "twice", "overrides": ["objective.domain_weights.code=2"]}]} | changes
    path = folder / "ablation.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def scored(ablation: Ablation, change: float) -> dict[str, dict[str, np.ndarray]]:
    """Runs whose nats are those of the baseline of their seed, times 1 + change in the variants' code."""
    found = {}
    for seed in ablation.seeds:
        base = {d: np.random.default_rng([seed, len(d)]).uniform(5, 9, len(t)) for d, t in TEXTS.items()}
        found[f"even-seed{seed}"], found[f"twice-seed{seed}"] = base, base | {"code": base["code"] * (1 + change)}
    return found


def test_differences_are_those_of_the_figures(tmp_path: Path) -> None:
    ablation = load_ablation(write(tmp_path, tmp_path))
    runs = scored(ablation, -0.1)
    result = compare(ablation, runs, TEXTS)
    size = {d: math.log(2) * sum(len(t.encode()) for t in texts) for d, texts in TEXTS.items()}
    for domain in ("code", "prose"):
        each = [runs[f"twice-seed{s}"][domain].sum() / size[domain] - runs[f"even-seed{s}"][domain].sum() / size[domain] for s in (0, 1)]
        of = result["variants"]["twice"]["domains"][domain]
        assert of["by_seed"] == pytest.approx(each) and of["difference"] == pytest.approx(np.mean(each))
    changed = result["variants"]["twice"]["domains"]
    assert changed["prose"]["difference"] == 0 and changed["prose"]["interval"] == [0, 0]
    low, high = changed["code"]["interval"]
    assert low <= changed["code"]["difference"] <= high < 0
    whole = sum(runs["twice-seed0"][d].sum() - runs["even-seed0"][d].sum() for d in TEXTS) / sum(size.values())
    assert changed["total"]["by_seed"][0] == pytest.approx(whole)
    assert result["baseline"]["domains"]["code"]["by_seed"][1] == pytest.approx(runs["even-seed1"]["code"].sum() / size["code"])
    draw_ablation(result, tmp_path / "new" / "picture.svg")
    assert "twice" in (tmp_path / "new" / "picture.svg").read_text()


def test_scores_are_nats_of_documents(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    found = score_run(tmp_path / "run", TEXTS)
    assert [len(found[d]) for d in TEXTS] == [3, 2] and (np.diff(found["code"]) > 0).all()


def test_the_shipped_ablation_is_one() -> None:
    ablation = load_ablation(ROOT / "configs" / "ablations" / "code-weight.yaml")
    assert len(ablation.all) == len(ablation.seeds) * (1 + len(ablation.variants)) >= 6
    assert {tuple(ablation.config(ablation.run(v, 0)).objective.domain_weights.items()) for v in ablation.variants} >= {(("code", 2.0),)}


@pytest.mark.parametrize(("changes", "words"), [
    ({"variants": [{"name": "same", "overrides": ["objective.domain_weights={}"]}]}, "variant same changes nothing of even"),
    ({"variants": [{"name": "even", "overrides": ["optimizer.lr=0.1"]}]}, "two runs have the name even-seed0"),
    ({"variants": [{"name": "other", "overrides": ["data.sequence_length=32"]}]}, "variant other has other data than even"),
    ({"variants": [{"name": "x", "overrides": ["objective.domain_weight=2"]}]}, "unknown key objective.domain_weight"),
    ({"variants": []}, "variants: List should have at least 1 item"),
    ({"seed": 3}, "seed: Extra inputs are not permitted; it has base, dir"),
])
def test_mistakes(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["ablate", str(write(tmp_path, tmp_path, **changes))])
    assert done.exit_code == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_whole_ablation_and_again(dataset: Path, tmp_path: Path) -> None:
    path = write(tmp_path, dataset, seeds=[0], overrides=["train.steps=6"])
    for trained in (2, 0):
        done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["ablate", str(path), "--ranks", "1"])
        assert done.exit_code == 0, done.output
        assert done.output.count("=== run ") == trained and "bits per byte of held-out text" in done.output
    result = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert result["variants"]["twice"]["domains"]["code"]["difference"] != 0 and (tmp_path / "out" / "ablation.svg").exists()
