"""`nextpt tune`: search over trials, continuation, the config that is written, user errors."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from launcher.cli import app
from nextpt.base.errors import ScalingError
from nextpt.config import Config, load_config, to_yaml
from nextpt.events import MetricsFile, SkipEvent, StepEvent, ValidationEvent
from nextpt.job.exit_record import write_exit_record
from nextpt.scaling.proxy import plan_proxy, transfer
from nextpt.scaling.run_set import NamedRun
from nextpt.scaling.tuned_config import write_config
from nextpt.scaling.tuning import Tuned, Tuning, create_tuning, run_search
from nextpt.scaling.tuning_plot import plot_tuning
from tests.support.commands import run_command
from tests.support.datasets import tiny

BEST_LR, BEST_DECAY = 0.005, 0.15
MODEL = {"parametrization": "mup", "base_width": 16, "width": 64, "heads": 8, "kv_heads": None}


def large_config(data: Path, folder: Path, **sections: Any) -> Config:
    train = {"steps": 400} | sections.pop("train", {})
    return tiny(data, folder / "large", model=MODEL, train=train, **sections)


def tuning_of(large: Config, folder: Path, seeds: int = 2, steps: int = 40) -> Tuning:
    proxy = plan_proxy(large, steps=steps, ranks=1)
    return create_tuning(proxy, folder / "tune", seeds)


def search(tuning: Tuning, large: Config, train: Trainer) -> Tuned:
    return run_search(tuning, large, transfer(tuning.proxy, large), train)


class Trainer:
    """Writes the files of a finished trial, whose loss is a parabola in both logarithms.

    Args:
        tuning: The trials.
        diverging_lr: Learning rates above it diverge.
        stop_at: Number of trials after which it is interrupted.
    """

    def __init__(
        self, tuning: Tuning, diverging_lr: float = math.inf, stop_at: float = math.inf
    ) -> None:
        self.tuning, self.diverging_lr, self.stop_at = tuning, diverging_lr, stop_at
        self.trained: list[str] = []

    def __call__(self, trial: NamedRun, number: int) -> None:
        if len(self.trained) >= self.stop_at:
            raise KeyboardInterrupt
        self.trained.append(trial.name)
        config, folder = self.tuning.config(trial), self.tuning.folder(trial)
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(to_yaml(config))
        section, seed = config.optimizer, config.run.seed
        lr, muon = section.lr, section.muon
        decay = section.weight_decay or (muon.weight_decay if muon else None)
        metrics = MetricsFile(folder / "metrics.jsonl", 0)
        metrics.on_event(StepEvent(10, 5120, 6.0, 3.0, 1e-3, 1.0, 100.0))
        if lr > self.diverging_lr:
            bad = config.guard.rollback_after
            metrics.on_event(SkipEvent(18, "loss is not finite", 9.0, 9.0, bad, bad))
            write_exit_record(folder, 2, "8 bad steps in a row", 18)
            return
        loss = 4 + 0.05 * math.log2(lr / BEST_LR) ** 2
        if decay:
            loss += 0.02 * math.log2(decay / BEST_DECAY) ** 2
        total = {"nats_per_token": loss + 0.1 * seed, "bpb": 1.0}
        metrics.on_event(ValidationEvent(config.total_steps, config.total_tokens, {}, total))


@pytest.fixture
def tuned(dataset: Path, tmp_path: Path) -> Tuned:
    large = large_config(dataset, tmp_path)
    tuning = tuning_of(large, tmp_path)
    return search(tuning, large, Trainer(tuning))


def test_the_search_finds_both_optima_and_counts_its_cost(tuned: Tuned) -> None:
    assert tuned.optima["optimizer.lr"].value == pytest.approx(BEST_LR)
    assert tuned.optima["optimizer.weight_decay"].value == pytest.approx(BEST_DECAY)
    cost = tuned.cost
    assert cost["trials"] == len(tuned.trials) == 20 and cost["diverged"] == 0
    assert cost["tokens"] == 20 * tuned.proxy.total_tokens
    factors = tuned.transfer
    assert tuned.values["optimizer.lr"] == pytest.approx(BEST_LR * factors.lr, rel=0.005)
    assert json.dumps(tuned.to_json(), allow_nan=False)


def test_an_interrupted_search_continues(dataset: Path, tmp_path: Path) -> None:
    large = large_config(dataset, tmp_path)
    tuning = tuning_of(large, tmp_path)
    first = Trainer(tuning, diverging_lr=0.007, stop_at=13)
    with pytest.raises(KeyboardInterrupt):
        search(tuning, large, first)
    second = Trainer(tuning_of(large, tmp_path), diverging_lr=0.007)
    result = search(tuning, large, second)
    assert len(first.trained) == 13 and not set(first.trained) & set(second.trained)
    assert len(first.trained) + len(second.trained) == result.cost["trials"]
    third = Trainer(tuning)
    assert search(tuning, large, third).to_json() == result.to_json()
    assert third.trained == []


def test_trials_that_diverged_are_shown_and_cost_what_they_trained(
    dataset: Path, tmp_path: Path
) -> None:
    large = large_config(dataset, tmp_path)
    tuning = tuning_of(large, tmp_path, seeds=1)
    result = search(tuning, large, Trainer(tuning, diverging_lr=0.013))
    diverged = [trial for trial in result.trials if trial["loss"] is None]
    assert len(diverged) == result.cost["diverged"] == 1 and diverged[0]["tokens"] == 5120
    assert result.optima["optimizer.lr"].is_bracketed
    assert "learning rate 0.024 diverged" in result.notes[0]
    plot_tuning(result, "trials", tmp_path / "tune.svg")
    assert "<svg" in (tmp_path / "tune.svg").read_text()


def test_if_everything_diverges_the_search_says_so(dataset: Path, tmp_path: Path) -> None:
    large = large_config(dataset, tmp_path)
    tuning = tuning_of(large, tmp_path, seeds=1)
    with pytest.raises(ScalingError, match="every learning rate diverged"):
        search(tuning, large, Trainer(tuning, diverging_lr=0.0))


def test_a_crash_is_no_divergence(dataset: Path, tmp_path: Path) -> None:
    tuning = tuning_of(large_config(dataset, tmp_path), tmp_path)
    trial = tuning.trial(0.003, 0.1, 0)
    Trainer(tuning, diverging_lr=0.0)(trial, 1)
    assert tuning.has_diverged(trial) and tuning.loss(trial) == math.inf
    write_exit_record(tuning.folder(trial), 1, "crashed", 18)
    assert not tuning.has_diverged(trial) and tuning.loss(trial) is None


def test_decay_of_zero_is_not_searched(dataset: Path, tmp_path: Path) -> None:
    large = large_config(dataset, tmp_path, optimizer={"lr": 0.003, "weight_decay": 0.0})
    tuning = tuning_of(large, tmp_path, seeds=1)
    result = search(tuning, large, Trainer(tuning))
    assert [*result.values] == ["optimizer.lr"]
    assert result.cost["trials"] == 5 and "no decay is above 0" in result.notes[-1]
    assert result.optima["optimizer.lr"].value == pytest.approx(BEST_LR)


def test_the_decay_of_a_group_is_searched_where_the_optimizer_has_none(
    dataset: Path, tmp_path: Path
) -> None:
    muon = {"kind": "muon", "lr": 0.003, "weight_decay": 0.0, "muon": {"weight_decay": 0.05}}
    large = large_config(dataset, tmp_path, optimizer=muon)
    tuning = tuning_of(large, tmp_path, seeds=1)
    result = search(tuning, large, Trainer(tuning))
    optimum = result.optima["optimizer.muon.weight_decay"]
    assert optimum.value == pytest.approx(BEST_DECAY)
    factor = result.transfer.weight_decay
    assert result.values["optimizer.muon.weight_decay"] == pytest.approx(
        BEST_DECAY * factor, rel=0.005
    )


def test_a_dataset_without_a_validation_split_is_refused(dataset: Path, tmp_path: Path) -> None:
    shards = shutil.copytree(dataset, tmp_path / "shards")
    manifest = json.loads((shards / "dataset.json").read_text())
    for counts in manifest["splits"]["validation"].values():
        counts["sequences"] = 0
    (shards / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(ScalingError, match="no validation split"):
        tuning_of(large_config(shards, tmp_path), tmp_path)
    assert not (tmp_path / "tune").exists()


def test_the_config_is_written_with_its_origin(tuned: Tuned, tmp_path: Path) -> None:
    source, target = tmp_path / "large.yaml", tmp_path / "tuned.yaml"
    source.write_text(to_yaml(tuned.large))
    write_config(tuned, source, ["train.log_every=7"], "nextpt tune large.yaml", target)
    text = target.read_text()
    config = load_config(target)
    values = tuned.values
    assert config.optimizer.lr == values["optimizer.lr"]
    assert config.optimizer.weight_decay == values["optimizer.weight_decay"]
    assert config.train.log_every == 7
    changed = {"optimizer": config.optimizer, "train": config.train}
    assert config == tuned.large.model_copy(update=changed)
    for words in (
        "# Learning rates and decays by `nextpt tune large.yaml`",
        "# proxy: width 16, depth 2,",
        "# cost: 20 trials (0 diverged; seeds 0, 1), ",
        "of the large run\n",
        "# optimizer.lr of the proxy: 0.005 (95 %: 0.005 to 0.005)",
        "# optimizer.weight_decay of the proxy: 0.15 (95 %: 0.15 to 0.15)",
        "times the tokens (D^-0.32, arXiv 2409.19913) x ",
    ):
        assert words in text, text
    with pytest.raises(ScalingError, match="cannot be written"):
        write_config(tuned, source, [], "nextpt tune", tmp_path / "none" / "tuned.yaml")


def test_trials_of_another_proxy_are_refused(tuned: Tuned, tmp_path: Path) -> None:
    other = tuning_of(tuned.large, tmp_path, steps=50)
    with pytest.raises(ScalingError, match=r"another config .*steps: 40 -> 50.*another dir"):
        search(other, tuned.large, Trainer(other))


def invoke(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["tune", *map(str, arguments)])


def test_a_dry_run_prints_the_cost_and_writes_nothing(dataset: Path, tmp_path: Path) -> None:
    source = tmp_path / "large.yaml"
    source.write_text(to_yaml(large_config(dataset, tmp_path)))
    result = invoke(source, "--steps", 40, "--seeds", 3, "--dry-run")
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    assert "30 trials: " in words and "of the large run; at most 54," in words
    assert "from proxy to large run: learning rate x" in words
    assert [path.name for path in tmp_path.iterdir()] == ["large.yaml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.parametrization=standard"], "set model.parametrization=mup model.base_width=64"),
        (["--steps", "500"], "--steps 500 is more than the 400 steps"),
        (["--output", "{source}"], "is the config that is tuned"),
        (["--output", "{folder}/none/a.yaml"], "none does not exist"),
        (["optimizer.lrr=1"], "unknown key optimizer.lrr"),
        (["--steps", "40", "data.path={folder}/none"], "none"),
    ],
)
def test_user_errors_are_one_line_and_leave_nothing(
    dataset: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    source = tmp_path / "large.yaml"
    source.write_text(to_yaml(large_config(dataset, tmp_path)))
    filled = [text.format(source=source, folder=tmp_path) for text in arguments]
    result = invoke(source, *filled)
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["large.yaml"]


@pytest.mark.slow
def test_a_whole_search(dataset: Path, tmp_path: Path) -> None:
    """Trials of four steps are trained; a second start trains none and writes the same."""
    source, folder = tmp_path / "run.yaml", tmp_path / "large-tune"
    source.write_text(to_yaml(large_config(dataset, tmp_path, train={"steps": 40})))
    arguments = ["tune", str(source), "--steps", "4", "--seeds", "1"]
    first = run_command(*arguments, COLUMNS="200")
    assert first.returncode == 0, first.stderr
    result = json.loads((folder / "tune.json").read_text())
    assert first.stdout.count("=== trial") == result["cost"]["trials"] >= 10
    tuned = load_config(folder / "tuned.yaml")
    assert tuned.optimizer.lr == result["values"]["optimizer.lr"]
    assert tuned.model.width == 64 and tuned.total_steps == 40
    assert (folder / "tune.png").read_bytes()[:4] == b"\x89PNG"
    written = (folder / "tuned.yaml").read_text()
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(
        app, ["config", "show", str(folder / "tuned.yaml")]
    )
    assert shown.exit_code == 0 and f"lr: {tuned.optimizer.lr}" in shown.output
    second = run_command(*arguments, COLUMNS="200")
    assert second.returncode == 0 and "===" not in second.stdout, second.stderr
    assert (folder / "tuned.yaml").read_text() == written


@pytest.mark.slow
def test_a_trained_trial_that_diverges_is_worse_than_all_others(
    dataset: Path, tmp_path: Path
) -> None:
    guard = {"rollback_after": 2}
    tuning = tuning_of(large_config(dataset, tmp_path, guard=guard), tmp_path, steps=8)
    trial = tuning.trial(1e6, 0.1, 0)
    result = run_command("train", "--config", str(tuning.base), *tuning.arguments(trial))
    assert result.returncode == 2 and "2 bad steps in a row" in result.stderr, result.stderr
    assert tuning.has_diverged(trial) and tuning.loss(trial) == math.inf
    assert tuning.tokens(trial) < tuning.config(trial).total_tokens
