"""Command line: help, user errors, shipped configs, a whole run through the deepspeed launcher."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli import app
from launcher.jobs.local import train_command
from nextpt.config import load_config, to_yaml
from nextpt.events import read_events
from tests.support.commands import run_command, start_command
from tests.support.datasets import tiny
from tests.support.ports import free_port

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["prep"],
        ["prep", "stdlib"],
        ["prep", "shards"],
        ["train"],
        ["eval"],
        ["generate"],
        ["inspect"],
        ["config"],
        ["config", "show"],
        ["report"],
        ["doctor"],
        ["plan"],
        ["demo"],
        ["memorization", "plant"],
        ["memorization", "canaries"],
        ["memorization", "extract"],
        ["memorization", "contamination"],
    ],
)
def test_help(command: list[str]) -> None:
    completed = run_command(*command, "--help")
    assert completed.returncode == 0 and "Usage" in completed.stdout
    if len(command) > 1 or (
        command
        and command[0] in ("train", "eval", "generate", "inspect", "report", "doctor", "plan")
    ):
        assert "example: nextpt" in completed.stdout


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_loads_and_has_about_the_parameters_of_its_name(path: Path) -> None:
    from nextpt.model import ModelSpec, count

    config = load_config(path)
    assert config.run.name == path.stem
    size = {"b": 1e9, "m": 1e6}.get(path.stem[-1])
    if size and path.stem != "demo":
        assert count(ModelSpec.from_config(config)).parameters == pytest.approx(
            float(path.stem[:-1]) * size, rel=0.15
        )


def test_config_show_prints_derived_values() -> None:
    pattern = ("model.sliding_window=1024", "model.layer_pattern=[local,local,local,global]")
    completed = run_command(
        "config", "show", "configs/7b.yaml", "train.zero_stage=3", *pattern, "--ranks", "64"
    )
    assert completed.returncode == 0, completed.stderr
    for line in (
        "vocab_size: 65536",
        "parameters                     7,516,467,200",
        "24   (of 32, a window of 1,024 tokens)",
        "224.00 MiB   (keys and values of 4,096 tokens, bf16)",
        "tokens per step",
        "memory per rank",
        "ZeRO-3",
    ):
        assert line in completed.stdout


def test_config_show_prints_what_follows_from_the_parametrization() -> None:
    overrides = ["model.parametrization=completep", "model.base_width=64", "model.base_depth=2"]
    show = ["config", "show", "configs/demo.yaml", "optimizer.kind=adamw", "optimizer.lr=7e-3"]
    result = CliRunner().invoke(app, [*show, "optimizer.decay_embeddings=true", *overrides])
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    for line in (
        "parametrization completep (m = 128 / 64 = 2, L = 4 / 2 = 2)",
        "initial std 0.02 (matrices of blocks 0.0141, o_proj and down_proj 0.00707)",
        "residual multiplier 0.5",
        "logits divided by 2",
        "matrices 851,968 0.0035, 0.2, 2.5e-09",
        "embedding 524,288 0.007, 0.1, 5e-09",
        "final_norm 128 0.007, 0, 5e-09",
    ):
        assert line in lines
    needs = CliRunner().invoke(app, [*show, "model.parametrization=mup"])
    assert needs.exit_code == 2 and "model.base_width=128" in needs.output


def test_config_show_prints_a_ramp_and_its_schedule() -> None:
    ramp = "train.batch_schedule=[{after_steps: 500, global_batch_size: 16}]"
    result = CliRunner().invoke(app, ["config", "show", "configs/demo.yaml", ramp, "--ranks", "2"])
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    for line in (
        "tokens per step 2,048 (1 micro-batches on each of 2 ranks, to step 500)",
        "tokens per step 4,096 (2 micro-batches on each of 2 ranks)",
        "steps 1,200",
        "total tokens 3,891,200",
        "learning rate 0.008 (step 40, end of the warm-up)",
        "learning rate 0.008 (step 660, start of the decay)",
        "learning rate 1.48e-05 (step 1,200, end)",
    ):
        assert line in lines


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["config", "show", "configs/demo.yaml", "model.dept=3"],
            ["unknown key model.dept", "model.depth"],
        ),
        (
            ["config", "show", "configs/demo.yaml", "model.depth=0"],
            ["model.depth = 0", "greater than or equal to 1"],
        ),
        (["config", "show", "configs/none.yaml"], ["configs/none.yaml does not exist"]),
        (
            ["config", "show", "configs/demo.yaml", "--ranks", "3"],
            ["train.global_batch_size", "4 x 3 = 12"],
        ),
        (
            [
                "train",
                "--config",
                "configs/demo.yaml",
                "train.zero_stage=0",
                "train.precision=bf16",
            ],
            ["train.zero_stage=1"],
        ),
        (["eval", "--run", "nowhere"], ["run folder nowhere does not exist"]),
        (["generate", "--run", "nowhere"], ["run folder nowhere does not exist"]),
        (["inspect", "--run", "nowhere", "--prompt", "a"], ["run folder nowhere does not exist"]),
        (
            [
                "prep",
                "shards",
                "a=nowhere",
                "--output",
                "x",
                "--sequence-length",
                "8",
                "--vocab-size",
                "300",
            ],
            ["nowhere does not exist"],
        ),
        (
            ["prep", "shards", "nowhere", "--output", "x", "--sequence-length", "8"],
            ["DOMAIN=PATH"],
        ),
    ],
)
def test_user_errors_end_with_one_line(arguments: list[str], words: list[str]) -> None:
    completed = run_command(*arguments)
    assert completed.returncode == 2
    assert completed.stderr.startswith("error: ") and completed.stderr.count("\n") == 1, (
        completed.stderr
    )
    for word in words:
        assert word in completed.stderr


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `nextpt train` on two ranks: new interpreters all the way, as users start it."""
    root = tmp_path_factory.mktemp("launched")
    config = tiny(
        dataset,
        root / "run",
        validation={"every_steps": 3, "sequences": 8},
        checkpoint={"every_steps": 3},
    )
    (root / "tiny.yaml").write_text(to_yaml(config))
    options = ["--config", str(root / "tiny.yaml"), "--ranks", "2", "train.zero_stage=2"]
    completed = subprocess.run(
        [sys.executable, "-m", "launcher.cli", "train", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert "step 6/6" in completed.stdout and "validation, step 3" in completed.stdout
    return root / "run"


def test_run_folder_has_its_fixed_form(trained: Path) -> None:
    assert {p.name for p in trained.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "environment.json",
        "exit.json",
        "lock-1.json",
        "metrics.jsonl",
        "tokenizer.json",
    }
    assert sorted(p.name for p in (trained / "checkpoints").iterdir()) == [
        "step-000000003",
        "step-000000006",
    ]
    events = read_events(trained / "metrics.jsonl", "train")
    assert [e["step"] for e in events] == list(range(1, 7))
    assert {"step", "tokens", "loss", "bpb", "lr", "grad_norm", "tokens_per_second"} <= events[
        0
    ].keys()
    assert load_config(trained / "config.yaml").train.zero_stage == 2


def test_a_run_without_a_valid_checkpoint_has_an_exit_code_of_its_own(
    trained: Path, tmp_path: Path
) -> None:
    """The code passes the deepspeed launcher, for scripts; nothing is trained from step 0."""
    shutil.copytree(trained, tmp_path / "run")
    for state in (tmp_path / "run").glob("checkpoints/*/state.json"):
        state.write_text("{}")
    before = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    completed = run_command(
        "train",
        "--config",
        str(tmp_path / "run" / "config.yaml"),
        "--ranks",
        "2",
        f"run.dir={tmp_path / 'run'}",
    )
    assert completed.returncode == 65, completed.stderr
    assert (
        completed.stderr.startswith("error: checkpoint ")
        and completed.stderr.count("\n") == 1
        and "does not start from nothing" in completed.stderr
    )
    assert (
        sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == before
        and len(before) == 2
    )


def test_eval_writes_the_fixed_json(trained: Path, tmp_path: Path) -> None:
    completed = run_command(
        "eval", "--run", str(trained), "--json", str(tmp_path / "out.json"), "--compressors"
    )
    assert completed.returncode == 0, completed.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    for figures in (*result["domains"].values(), result["total"]):
        assert {"tokens", "bytes", "nats_per_token", "bpb", "perplexity"} <= figures.keys()
    assert set(result["domains"]) == {"code", "prose"} and "xz -9e" in completed.stdout
    assert result["total"]["bytes"] == sum(f["bytes"] for f in result["domains"].values())


def test_generate_continues_a_prompt(trained: Path) -> None:
    first, second = (
        run_command(
            "generate",
            "--run",
            str(trained),
            "--prompt",
            "def f",
            "--max-tokens",
            "20",
            "--seed",
            "5",
        )
        for _ in "12"
    )
    assert first.returncode == 0, first.stderr
    assert (
        first.stdout.startswith("def f") and len(first.stdout) > 8 and first.stdout == second.stdout
    )
    missing = run_command("generate", "--run", str(trained), "--step", "4")
    assert missing.stderr.count("there are: 6, 3") == 1


def test_report_of_a_real_run(trained: Path, tmp_path: Path) -> None:
    assert (
        run_command(
            "generate", "--run", str(trained), "--prompt", "import", "--max-tokens", "5", "--save"
        ).returncode
        == 0
    )
    completed = run_command("report", str(trained), "--output", str(tmp_path / "r.html"))
    assert completed.returncode == 0, completed.stderr
    page = (tmp_path / "r.html").read_text()
    assert (
        "complete" in page
        and ">import</span>" in page
        and "step-000000006" in page
        and "2 x " in page
    )


def wait_for(condition: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_interrupt_ends_all_ranks_with_one_line(
    dataset: Path, tmp_path: Path, number: int
) -> None:
    (tmp_path / "tiny.yaml").write_text(
        to_yaml(tiny(dataset, tmp_path / "run", train={"steps": 100_000}))
    )
    job = start_command(
        "train", "--config", str(tmp_path / "tiny.yaml"), "--ranks", "2", new_session=True
    )
    wait_for(lambda: len(read_events(tmp_path / "run" / "metrics.jsonl", "train")) > 3)
    job.send_signal(number)
    _, errors = job.communicate(timeout=300)
    assert (
        job.returncode == 130
        and errors.strip() == "interrupted; no file is half-written, and the same command continues"
    )
    ranks = [
        p
        for p in Path("/proc").iterdir()
        if p.name.isdigit() and str(tmp_path / "tiny.yaml").encode() in _command(p)
    ]
    assert ranks == []


def _command(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def test_a_killed_rank_is_reported(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(
        to_yaml(tiny(dataset, tmp_path / "run", train={"steps": 100_000}))
    )
    job = start_command(
        "train", "--config", str(tmp_path / "tiny.yaml"), "--ranks", "2", "--restarts", "0"
    )
    wait_for(lambda: len(read_events(tmp_path / "run" / "metrics.jsonl", "train")) > 3)
    [rank] = [
        int(p.name)
        for p in Path("/proc").iterdir()
        if p.name.isdigit()
        and b"--local_rank=1\0" in (c := _command(p))
        and str(tmp_path / "tiny.yaml").encode() in c
        and b"launch.py" not in c
    ]
    os.kill(rank, signal.SIGKILL)
    _, errors = job.communicate(timeout=300)
    assert (
        job.returncode == 137
        and "ended by signal 9 (Killed), most likely because memory ran out" in errors
    ), errors[-2000:]
    assert "Traceback" not in errors, errors[-2000:]


def test_a_port_in_use_is_named(dataset: Path, tmp_path: Path) -> None:
    import socket

    (tmp_path / "tiny.yaml").write_text(to_yaml(tiny(dataset, tmp_path / "run")))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        environment = os.environ | {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        completed = subprocess.run(
            [
                sys.executable,
                str(ROOT / "launcher/run.py"),
                "--config",
                str(tmp_path / "tiny.yaml"),
            ],
            capture_output=True,
            text=True,
            env=environment,
            timeout=600,
        )
    assert completed.returncode == 2
    error = [line for line in completed.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and f"127.0.0.1:{port}" in error[0] and "--master_port" in error[0]
    assert "Traceback" not in completed.stderr and not (tmp_path / "run").exists()


def _steps(run: Path) -> int:
    return len(read_events(run / "metrics.jsonl", "train"))


# What a job has come to when all its processes die: from imports to the end of its last save
MOMENTS: dict[str, Callable[[Path, str], object]] = {
    "launched": lambda run, config: True,
    "ranks": lambda run, config: (
        b"--local_rank=1\0"
        in b"".join(
            c for p in Path("/proc").glob("[0-9]*") if config.encode() in (c := _command(p))
        )
    ),
    "locked": lambda run, config: list(run.glob("lock-*.json")),
    "first step": lambda run, config: _steps(run) >= 1,
    "saving": lambda run, config: list(run.glob("checkpoints/.staging-*/*")) or _steps(run) >= 4,
    "after a save": lambda run, config: _steps(run) >= 4,
    "last step": lambda run, config: _steps(run) >= 6,
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_at_any_moment_ends_with_the_same_metrics(
    dataset: Path, trained: Path, tmp_path: Path, moment: str
) -> None:
    """Every process of the job dies at once.

    The same command then ends with the metrics of a run without kills.
    """
    changes = {"validation": {"every_steps": 3, "sequences": 8}, "checkpoint": {"every_steps": 3}}
    config = tmp_path / "tiny.yaml"
    config.write_text(to_yaml(tiny(dataset, tmp_path / "run", **changes)))
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}

    def command() -> list[str]:
        return train_command(str(config), ["train.zero_stage=2"], 2, free_port())

    job = subprocess.Popen(
        command(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=environment,
    )
    deadline = time.monotonic() + 600
    while not MOMENTS[moment](tmp_path / "run", str(config)) and job.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    with suppress(ProcessLookupError):  # it has ended
        os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    completed = subprocess.run(
        command(), capture_output=True, text=True, timeout=900, env=environment
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    losses = [
        [(e["step"], e["loss"]) for e in read_events(run / "metrics.jsonl", "train")]
        for run in (trained, tmp_path / "run")
    ]
    assert losses[0] == losses[1]
    assert not (tmp_path / "extensions").exists(), "something was compiled, and could leave a lock"
