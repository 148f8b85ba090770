"""`nextpt slurm submit` without Slurm: the script it writes, and its refusals."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli import app
from launcher.jobs.slurm import check_time_limit
from nextpt.base.errors import ConfigError
from nextpt.config import to_yaml
from tests.support.datasets import tiny


@pytest.fixture
def config(dataset: Path, tmp_path: Path) -> Path:
    path = tmp_path / "a config.yaml"
    path.write_text(to_yaml(tiny(dataset, tmp_path / "run", checkpoint={"grace_seconds": 200})))
    return path


def submit(config: Path, *options: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(
        app, ["slurm", "submit", "--config", str(config), "--nodes", "2", *options]
    )
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.process
def test_the_script_has_the_options_and_passes_on_the_arguments(
    config: Path, tmp_path: Path
) -> None:
    code, output, _ = submit(
        config,
        "--gpus-per-node",
        "2",
        "--sbatch",
        "--partition=gpu",
        "--sbatch=--time=1:00:00",
        "--dry-run",
        "data.scratch=$(touch pwned) x",
    )
    assert code == 0
    script = tmp_path / "run" / "slurm" / "job.sbatch"
    text = script.read_text()
    assert text.strip() in output and subprocess.run(["bash", "-n", str(script)]).returncode == 0
    header = [
        line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")
    ]
    assert len({line.partition("=")[0] for line in header}) == len(header)  # each option once
    for line in (
        "--nodes=2",
        "--ntasks-per-node=2",
        "--gpus-per-node=2",
        "--partition=gpu",
        "--time=1:00:00",
        "--signal=USR1@260",
        "--requeue",
        f"--output={tmp_path}/run/slurm/%j.log",
    ):
        assert line in header, (line, header)
    before = text[: text.index("set -euo pipefail")]
    arguments = subprocess.run(
        ["bash", "-c", f'{before}\nprintf "%s\\n" "$@"'],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    ).stdout.splitlines()
    assert (
        arguments == [str(config), "data.scratch=$(touch pwned) x"]
        and not (tmp_path / "pwned").exists()
    )


def test_no_gpus_are_requested_for_cpu_runs(config: Path, tmp_path: Path) -> None:
    assert submit(config, "--gpus-per-node", "0", "--ranks-per-node", "2", "--dry-run")[0] == 0
    text = (tmp_path / "run" / "slurm" / "job.sbatch").read_text()
    assert "--gpus-per-node" not in text and "--ntasks-per-node=2" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus-per-node", "3"], "is not a multiple of train.micro_batch_size x ranks = 2 x 6"),
        (["--gpus-per-node", "2", "--ranks-per-node", "1"], "there is one rank for each GPU"),
        (["--sbatch", "partition=gpu", "--gpus-per-node", "2"], "not of the form"),
        (["--gpus-per-node", "2", "data.path=/nowhere"], "holds no dataset.json"),
        (["--gpus-per-node", "2", "--time", "4:20"], "--time 4:20 is 260 s, and"),
        (["--gpus-per-node", "2", "--sbatch=--time=0-0:02"], "signalled to save 260 s before"),
    ],
)
def test_refusals_leave_nothing(
    config: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    code, _, errors = submit(config, *options)
    assert (
        code == 2
        and message in errors
        and errors.count("\n") == 1
        and not (tmp_path / "run").exists()
    )


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("2", 120),
        ("2:30", 150),
        ("1:00:00", 3600),
        ("1-0", 86400),
        ("1-1:1", 90060),
        ("1-1:1:1", 90061),
    ],
)
def test_time_limits_in_the_formats_of_sbatch(limit: str, seconds: int) -> None:
    refused = {"--time": limit, "--signal": f"USR1@{seconds}"}
    with pytest.raises(ConfigError, match=f"--time {limit} is {seconds} s"):
        check_time_limit(refused)
    check_time_limit(refused | {"--signal": f"USR1@{seconds - 1}"})


@pytest.mark.parametrize("limit", ["0", "UNLIMITED", ""])
def test_no_time_limit_is_not_refused(limit: str) -> None:
    check_time_limit({"--time": limit, "--signal": "USR1@120"})


def test_without_sbatch_the_script_is_named(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, errors = submit(config, "--gpus-per-node", "2")
    assert code == 2 and f"sbatch {tmp_path}/run/slurm/job.sbatch" in errors
