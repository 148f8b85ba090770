"""`nextpt ablate`: user errors, and a whole tiny ablation that is interrupted and continued."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from launcher.cli import app
from nextpt.config import to_yaml
from tests.support.commands import run_command
from tests.support.datasets import tiny

ROOT = Path(__file__).resolve().parents[2]
CODE = {"name": "code-8", "overrides": ["objective.domain_weights.code=8"]}


def write_ablation(folder: Path, data: Path, **changes: Any) -> Path:
    (folder / "base.yaml").write_text(to_yaml(tiny(data, folder)))
    values = {
        "base": "base.yaml",
        "dir": str(folder / "ablation"),
        "baseline": {"name": "equal", "overrides": []},
        "variants": [CODE],
    } | changes
    path = folder / "ablation.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def variant(name: str, *overrides: str) -> dict[str, Any]:
    return {"variants": [CODE, {"name": name, "overrides": list(overrides)}]}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"variant": []},
            (
                "variant: Extra inputs are not permitted; an ablation has base, dir, overrides,"
                " seeds, baseline, variants"
            ),
        ),
        ({"seeds": [1, 1]}, "seeds: [1, 1] repeats a seed"),
        (variant("code-8", "train.steps=7"), "two variants have the name code-8"),
        (
            variant("same", "objective.domain_weights.prose=1"),
            "variants.1: same is the same run as equal",
        ),
        (
            variant("again", "objective.domain_weights.code=8.0"),
            "variants.1: again is the same run as code-8",
        ),
        (
            variant("seed", "run.seed=4"),
            (
                "seed: run.seed=4: names and folders follow from the variant's name, seeds are the"
                " file's `seeds`"
            ),
        ),
        (variant("typo", "model.widht=48"), "typo: .*base.yaml: unknown key model.widht"),
        (
            variant("poetry", "objective.domain_weights.poetry=2"),
            "poetry: objective.domain_weights names domain 'poetry'; .* has code, prose",
        ),
        ({"base": "none.yaml"}, "none.yaml does not exist"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_user_errors_in_ablations(
    tmp_path: Path, dataset: Path, changes: dict[str, Any], message: str
) -> None:
    path = write_ablation(tmp_path, dataset, **changes)
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["ablate", str(path)])
    assert (
        result.exit_code == 2 and result.stderr.count("\n") == 1 and str(path) in result.stderr
    ), result.output
    assert re.search(message.replace("[", r"\["), result.stderr), result.stderr
    assert not (tmp_path / "ablation").exists()


@pytest.mark.thorough
def test_a_folder_of_another_run_is_refused(tmp_path: Path, dataset: Path) -> None:
    path, folder = write_ablation(tmp_path, dataset), tmp_path / "ablation" / "equal-s0"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        to_yaml(tiny(dataset, folder, run={"name": "equal-s0"}, optimizer={"lr": 0.1}))
    )
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["ablate", str(path)])
    assert (
        result.exit_code == 2
        and f"{folder} holds a run of another config than equal-s0 (optimizer.lr: 0.1 -> 0.003)"
        in result.stderr
    ), result.output


@pytest.mark.slow
def test_a_whole_ablation(tmp_path: Path, dataset: Path) -> None:
    """A weight of 8 on code for six steps: a baseline and a variant are trained.

    A second start trains and scores nothing.
    """
    path = write_ablation(tmp_path, dataset)
    first = run_command("ablate", str(path), COLUMNS="200")
    assert first.returncode == 0 and [
        line.split()[3] for line in first.stdout.splitlines() if "===" in line
    ] == ["equal-s0:", "code-8-s0:"], first.stderr
    assert (
        "code-8: objective.domain_weights.code 1.0 -> 8.0" in first.stdout
        and first.stdout.count("scoring ") == 2
    )
    content = (tmp_path / "ablation" / "ablation.json").read_text()
    result = json.loads(content)
    variant = result["variants"][0]
    assert (
        variant["domains"]["code"]["difference"] != 0
        and result["baseline"]["changes"] == {}
        and result["step"] == 6
    )
    assert (
        f"{variant['domains']['code']['difference']:+.4f}" in first.stdout
        and (tmp_path / "ablation" / "ablation.png").read_bytes()[:4] == b"\x89PNG"
    )
    second = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["ablate", str(path)])
    assert second.exit_code == 0 and "===" not in second.output and "scoring" not in second.output
    assert (tmp_path / "ablation" / "ablation.json").read_text() == content
