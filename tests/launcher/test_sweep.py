"""`nextpt scaling sweep`: checks, predictions first, Slurm scripts, a tiny ladder."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from launcher.cli import app
from nextpt.base.errors import ScalingError
from nextpt.config import to_yaml
from nextpt.events import MetricsFile, StepEvent, ValidationEvent, read_events
from nextpt.model import ModelSpec, count
from nextpt.scaling.ladder import Ladder, is_done, load_ladder, write_prediction, write_result
from nextpt.scaling.laws import CHINCHILLA
from nextpt.scaling.observations import read_run_folders
from nextpt.scaling.run_set import NamedRun
from tests.support.commands import run_command
from tests.support.datasets import tiny

ROOT = Path(__file__).resolve().parents[2]
TRUE = {"A": 30.0, "B": 60.0, "E": 1.5, "alpha": 0.25, "beta": 0.3}
# Near the loss of so short a training with 512 tokens, ln 512 = 6.2
YOUNG = {"A": 2.0, "B": 3.0, "E": 5.5, "alpha": 0.25, "beta": 0.3}
WIDTHS, STEPS = (16, 32, 48), (4, 8, 16)


def write_ladder(folder: Path, data: Path, **changes: Any) -> Path:
    (folder / "base.yaml").write_text(to_yaml(tiny(data, folder)))
    rungs = [
        {"name": f"w{w}-s{s}", "overrides": [f"model.width={w}", f"train.steps={s}"]}
        for w in WIDTHS
        for s in STEPS
    ]
    values = {
        "base": "base.yaml",
        "dir": str(folder / "ladder"),
        "rungs": rungs,
        "target": {"name": "large", "overrides": ["model.width=96", "train.steps=30"]},
    } | changes
    path = folder / "ladder.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def finish(ladder: Ladder, rung: NamedRun, time: float = 1e9, law: dict[str, float] = TRUE) -> None:
    """Write the files of a finished run, with the loss by the law."""
    config, folder = ladder.config(rung), ladder.folder(rung)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    tokens = config.total_tokens
    noise = np.exp(0.001 * np.random.default_rng(tokens + config.model.width).standard_normal())
    loss = (
        float(CHINCHILLA.loss(law, count(ModelSpec.from_config(config)).parameters, tokens)) * noise
    )
    metrics = MetricsFile(folder / "metrics.jsonl", 0)
    metrics.on_event(StepEvent(1, 512, 6.0, 3.0, 1e-3, 1.0, 100.0, time=time))
    metrics.on_event(
        ValidationEvent(config.total_steps, tokens, {}, {"nats_per_token": loss, "bpb": loss})
    )


@pytest.mark.thorough
def test_the_shipped_ladder_is_valid() -> None:
    ladder = load_ladder(ROOT / "configs" / "ladders" / "demo.yaml")
    assert (
        len({count(ModelSpec.from_config(ladder.config(rung))).parameters for rung in ladder.rungs})
        >= 4
    )
    assert (
        ladder.config(ladder.target).validation.every_steps
        == ladder.config(ladder.target).total_steps
    )


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target": {"name": "large", "overrides": ["model.width=48", "train.steps=20"]}},
            "target large takes 1.25 times the compute of w48-s16",
        ),
        ({"target": {"name": "w16-s4", "overrides": []}}, "two rungs have the name w16-s4"),
        ({"rungs": [{"name": f"r{i}", "overrides": []} for i in range(5)]}, "5 rungs are too few"),
        ({"rung": []}, "rung: Extra inputs are not permitted; a ladder has base, dir"),
        ({"target": {"name": "large", "overrides": ["model.widht=48"]}}, "unknown key model.widht"),
        ({"base": "none.yaml"}, "none.yaml does not exist"),
    ],
)
def test_user_errors_in_ladders(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_ladder(tmp_path, tmp_path, **changes)
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["scaling", "sweep", str(path)])
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1, (
        result.output
    )
    assert not (tmp_path / "ladder").exists()


@pytest.mark.thorough
def test_a_prediction_precedes_the_target_run_and_is_kept(tmp_path: Path) -> None:
    ladder = load_ladder(write_ladder(tmp_path, tmp_path))
    for rung in ladder.rungs:
        finish(ladder, rung)
    prediction = write_prediction(ladder)
    true = float(CHINCHILLA.loss(TRUE, prediction["parameters"], prediction["tokens"]))
    assert prediction["interval"][0] < true < prediction["interval"][1] and prediction[
        "loss"
    ] == pytest.approx(true, rel=0.01)
    assert (
        json.loads((ladder.dir / "prediction.json").read_text())
        == json.loads(json.dumps(prediction))
        and (ladder.dir / "fit.json").is_file()
    )
    finish(ladder, ladder.target, time=prediction["written"] + 1)
    before = (ladder.dir / "prediction.json").read_bytes()
    write_prediction(ladder)
    assert (ladder.dir / "prediction.json").read_bytes() == before
    result = write_result(ladder)
    assert (
        result["prediction_before_first_step"] and result["inside"] and abs(result["error"]) < 0.01
    )
    assert result["error"] == pytest.approx(result["predicted"] / result["measured"] - 1)
    (ladder.dir / "prediction.json").unlink()
    with pytest.raises(ScalingError, match="the prediction must be written first"):
        write_prediction(ladder)


@pytest.mark.thorough
def test_run_folders_must_be_finished_but_for_curves(tmp_path: Path) -> None:
    ladder = load_ladder(write_ladder(tmp_path, tmp_path))
    folders = [ladder.folder(rung) for rung in ladder.rungs]
    for rung in ladder.rungs:
        finish(ladder, rung)
    longer = to_yaml(ladder.config(ladder.rungs[0])).replace("steps: 4", "steps: 5")
    (folders[0] / "config.yaml").write_text(longer)
    with pytest.raises(
        ScalingError, match="w16-s4 is not finished: its last validation is of step 4 of 5"
    ):
        read_run_folders(folders)
    curves = read_run_folders(folders, curves=True)
    assert len(curves) == len(read_run_folders(folders[1:])) + 1
    small = read_run_folders(folders[1:], "non_embedding_parameters")
    assert (
        small.parameters
        == [
            count(ModelSpec.from_config(ladder.config(rung))).non_embedding_parameters
            for rung in ladder.rungs[1:]
        ]
    ).all()
    assert (
        small.tokens == [ladder.config(rung).total_steps * 512 for rung in ladder.rungs[1:]]
    ).all()


@pytest.mark.thorough
def test_rungs_of_another_config_are_refused(tmp_path: Path) -> None:
    ladder = load_ladder(write_ladder(tmp_path, tmp_path))
    assert not is_done(ladder, ladder.rungs[0])
    finish(ladder, ladder.rungs[0])
    assert is_done(ladder, ladder.rungs[0])
    other = ladder.model_copy(update={"overrides": ["optimizer.lr=0.1"]})
    with pytest.raises(ScalingError, match=r"another config than w16-s4 .optimizer.lr"):
        is_done(other, other.rungs[0])
    with pytest.raises(ScalingError, match=r"has no validation|not a run folder"):
        write_prediction(ladder)


@pytest.mark.process
def test_scripts_for_slurm(tmp_path: Path) -> None:
    path = write_ladder(tmp_path, tmp_path)
    result = CliRunner().invoke(
        app, ["scaling", "sweep", str(path), "--slurm", "--ranks", "2", "--sbatch=--partition=gpu"]
    )
    assert result.exit_code == 0 and "--dependency=afterok:$job" in result.stdout
    rungs, target = (
        (tmp_path / "ladder" / "slurm" / name).read_text()
        for name in ("rungs.sbatch", "target.sbatch")
    )
    assert "#SBATCH --array=0-8\n#SBATCH --partition=gpu\n" in rungs and "--array" not in target
    assert (
        shlex.join(["scaling", "sweep", str(path), "--ranks", "2"])
        + ' --rung "$SLURM_ARRAY_TASK_ID"'
        in rungs
    )
    # As Slurm starts it, with a number that no rung has: it reaches the command.
    started = subprocess.run(
        ["bash", str(tmp_path / "ladder" / "slurm" / "rungs.sbatch")],
        capture_output=True,
        text=True,
        env=os.environ | {"SLURM_ARRAY_TASK_ID": "9"},
    )
    assert started.returncode == 2 and "--rung 9: the ladder has 9 rungs" in started.stderr


@pytest.mark.slow
def test_a_whole_ladder(tmp_path: Path, dataset: Path) -> None:
    """Two starts train two rungs and the target; the third has nothing to do.

    The other rungs are written.
    """
    path = write_ladder(tmp_path, dataset)
    ladder = load_ladder(path)
    for rung in ladder.rungs[2:]:
        finish(ladder, rung, law=YOUNG)
    command = ["scaling", "sweep", str(path)]
    first = run_command(*command, "--rung", "0", COLUMNS="200")
    assert (
        first.returncode == 0
        and is_done(ladder, ladder.rungs[0])
        and not is_done(ladder, ladder.rungs[1])
    ), first.stderr
    completed = run_command(*command, COLUMNS="200")
    assert completed.returncode == 0 and [
        line.split()[2] for line in completed.stdout.splitlines() if "===" in line
    ] == ["2/9", "large:"], completed.stderr
    result = json.loads((tmp_path / "ladder" / "result.json").read_text())
    assert (
        result["prediction_before_first_step"]
        and f"off by {result['error']:+.2%}" in completed.stdout
    )
    assert len(read_events(tmp_path / "ladder" / "large" / "metrics.jsonl", "validation")) == 1
    second = run_command(*command, COLUMNS="200")
    assert (
        second.returncode == 0
        and "===" not in second.stdout
        and f"off by {result['error']:+.2%}" in second.stdout
    )
