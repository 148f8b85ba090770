"""Compatibility: what commit df2806d wrote loads, resumes and evaluates to the same figures."""

from __future__ import annotations

import json
import platform
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from launcher.cli import app
from nextpt.base.errors import ConfigError
from nextpt.config import Config, all_keys, load_config, parse_config
from nextpt.data.dataset import open_sequences
from nextpt.data.loader import Loader
from nextpt.data.sequences import load_manifest
from nextpt.events import read_events
from tests.support.commands import run_command
from tests.support.ranks import run_jobs

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "before_field_names"
RENAMED = {
    "guard.spikes": "guard.spike_sigma",
    "objective.z_loss": "objective.z_loss_coefficient",
    "validation.rows": "validation.sequences",
    "data.repeat_caps": "data.max_epochs",
}
RUNS = {"run": (1, 1), "run-zero2": (2, 2)}  # ranks, ZeRO stage
RECORDED = json.loads((FIXTURES / "resumed.json").read_text())


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the fixtures in which the current code resumed both runs from step 8."""
    root = Path(shutil.copytree(FIXTURES, tmp_path_factory.mktemp("before") / "old"))
    jobs = [(config_of(root, run), ranks) for run, (ranks, _) in RUNS.items()]
    for run in RUNS:
        shutil.copytree(root / run, root / f"{run}-resumed")
    run_jobs(jobs, root / "jobs")
    return root


@pytest.fixture
def inside(old: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The copy as the working folder: the paths in its configs are relative."""
    monkeypatch.chdir(old)
    return old


def config_of(root: Path, run: str) -> Config:
    return load_config(
        root / "config.yaml",
        [
            f"run.dir={root / f'{run}-resumed'}",
            f"data.path={root / 'dataset'}",
            f"train.zero_stage={RUNS[run][1]}",
            "checkpoint.resume=8",
        ],
        warn_deprecated=False,
    )


def numbers(value: Any) -> Iterator[float]:
    """All numbers in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def same_machine() -> bool:
    """Whether results are bit-reproducible on this machine."""
    # MKL takes other code on processors of another vendor, whatever their vector instructions
    vendor = re.search(r"^vendor_id\s*: (\S+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return vendor is not None and {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "vendor": vendor.group(1),
    } == {key: RECORDED[key] for key in ("torch", "cpu_capability", "machine", "vendor")}


@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_gets_the_losses_that_the_old_code_gets(
    old: Path, run: str, record_property: Any
) -> None:
    """Bit for bit with the recorded torch and vector instructions, else to 1e-6."""
    events = [
        event
        for event in read_events(old / f"{run}-resumed" / "metrics.jsonl", "train")
        if event["step"] > 8
    ]
    expected = RECORDED[run]
    assert [event["step"] for event in events] == expected["steps"]
    starts = json.loads((old / f"{run}-resumed" / "environment.json").read_text())["starts"]
    assert [start["first_step"] for start in starts] == [1, 9]
    record_property("compared", "bit for bit" if same_machine() else "to 1e-6")
    for name in ("loss", "grad_norm"):
        values = [event[name] for event in events]
        if same_machine():
            assert values == expected[name]
        assert values == pytest.approx(expected[name], rel=1e-6)


@pytest.mark.parametrize("run", RUNS)
def test_an_evaluation_gives_the_same_figures(inside: Path, run: str) -> None:
    expected = json.loads((inside / f"{run}-evaluation.json").read_text())
    arguments = ["eval", "--run", run, "--json", f"{run}-now.json", "--resamples", "20"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    evaluation = json.loads((inside / f"{run}-now.json").read_text())
    assert evaluation["total"]["nats_per_token"] == pytest.approx(
        expected["total"]["nats_per_token"], rel=0 if same_machine() else 1e-6
    )
    # By value: fields were renamed, values were not. Starts of documents are apart now.
    assert sum(row["tokens"] for row in evaluation.pop("by_context")) == sum(
        row["tokens"] for row in expected.pop("by_context")
    )
    now, before = sorted(numbers(evaluation)), sorted(numbers(expected))
    assert len(now) == len(before) > 50
    assert now == pytest.approx(before, rel=1e-12 if same_machine() else 1e-6)


@pytest.mark.parametrize("run", ["run", "run-zero2-resumed"])
def test_a_report_shows_the_run(inside: Path, run: str) -> None:
    result = CliRunner().invoke(app, ["report", run, "--output", f"{run}.html"])
    assert result.exit_code == 0, result.output
    page = (inside / f"{run}.html").read_text()
    expected = json.loads((FIXTURES / run.removesuffix("-resumed") / "evaluation.json").read_text())
    assert f"{expected['total']['nats_per_token']:.3f}" in page
    assert "spike_sigma: 6.0" in page


def test_the_checkpoints_are_listed_and_verify(inside: Path) -> None:
    result = CliRunner().invoke(app, ["checkpoint", "verify", "run"])
    assert result.exit_code == 0, result.output
    assert "step-000000008" in result.output and "step-000000012" in result.output


def test_the_dataset_is_read(inside: Path) -> None:
    manifest = load_manifest("dataset")
    for split, domains in manifest.splits.items():
        sequences = open_sequences(Path("dataset"), split)
        for domain, counts in domains.items():
            assert len(sequences[domain]) == counts.sequences > 100
            tokens = sum(int(sequences[domain][i].doc_lens.sum()) for i in range(counts.sequences))
            assert tokens == counts.sequences * (manifest.sequence_length + 1)


def test_a_state_with_skipped_data_in_its_old_spelling_is_loaded(old: Path) -> None:
    loader = Loader(config_of(old, "run"), 0, 1)
    state = json.loads((FIXTURES / "run/checkpoints/step-000000008/state.json").read_text())
    loader.check_state(state["data"])
    loader.load_state(state["data"] | {"passed_over": [[16, 40]]})
    assert loader.skipped == [(16, 40)] and loader.state(5)["skipped"] == [[16, 40]]
    loader.close()


def test_every_deprecated_key_of_a_file_warns_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = load_config(FIXTURES / "config.yaml")
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == len(RENAMED)
    for old_name, new_name in RENAMED.items():
        (message,) = [m for m in messages if old_name in m]
        assert f"{old_name} is now {new_name}" in message
    assert (config.guard.spike_sigma, config.objective.z_loss_coefficient) == (6.0, 1e-4)
    assert (config.validation.sequences, config.data.max_epochs) == (8, {"code": 20, "prose": 20})


def test_all_deprecated_keys_are_tested() -> None:
    declared = {
        f"{key.parent}.{old}": key.name for key in all_keys() for old in key.metadata.deprecated
    }
    assert declared == RENAMED


@pytest.mark.parametrize("old_name", RENAMED)
def test_a_deprecated_key_of_an_override_warns_once_and_wins(
    old_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.yaml"
    shutil.copy(FIXTURES / "config.yaml", file)
    for old_key, new_key in RENAMED.items():
        old_leaf, new_leaf = old_key.partition(".")[2], new_key.partition(".")[2]
        file.write_text(file.read_text().replace(f"{old_leaf}: ", f"{new_leaf}: "))
    with pytest.warns(FutureWarning, match=f"{old_name} is now {RENAMED[old_name]};") as caught:
        config = load_config(file, [f"{old_name}=9"])
    assert len(caught) == 1
    section, _, leaf = RENAMED[old_name].partition(".")
    assert getattr(getattr(config, section), leaf) == 9
    monkeypatch.setenv("RANK", "1")  # one rank warns for all
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_config(file, [f"{old_name}=9"])


def test_a_command_prints_each_deprecated_key_as_one_line() -> None:
    completed = run_command("config", "show", str(FIXTURES / "config.yaml"))
    assert completed.returncode == 0, completed.stderr
    lines = completed.stderr.splitlines()
    assert len(lines) == len(RENAMED) and all(line.startswith("warning: ") for line in lines)
    for old_name, new_name in RENAMED.items():
        assert sum(f"{old_name} is now {new_name};" in line for line in lines) == 1


def test_an_override_by_the_new_name_replaces_the_value_of_the_old_one() -> None:
    config = load_config(FIXTURES / "config.yaml", ["guard.spike_sigma=3"], warn_deprecated=False)
    assert config.guard.spike_sigma == 3


def test_both_names_at_once_are_refused() -> None:
    values = {"guard": {"spikes": 5, "spike_sigma": 6}}
    with pytest.raises(ConfigError, match=r"guard\.spikes is the old name of guard\.spike_sigma"):
        parse_config(values, "run.yaml")
    assert values == {"guard": {"spikes": 5, "spike_sigma": 6}}


def test_the_config_of_a_run_folder_is_read_without_a_warning(inside: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        result = CliRunner().invoke(app, ["report", "run", "--output", "quiet.html"])
    assert result.exit_code == 0, result.output
