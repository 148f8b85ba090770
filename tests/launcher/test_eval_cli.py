"""`nextpt eval` on files, runs and Hugging Face folders: fixed JSON, plots, user errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli import app
from nextpt.evaluate.loaded_model import open_run
from nextpt.exchange import export_hf
from nextpt.exchange.decoder import load_model
from tests.support.models import checkpoint_of
from tests.support.runs import make_run

FIXED = {"tokens", "bytes", "nats_per_token", "bpb", "bpb_with_eod", "perplexity"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    make_run(folder / "run")
    export_hf(open_run(folder / "run"), folder / "run" / "tokenizer.json", folder / "hf")
    (folder / "a.txt").write_text("Whan that Aprille with his shoures soote\n" * 20)
    (folder / "b.txt").write_text("def f(x):\n    return x\n" * 9)
    return folder


def evaluate(*arguments: str | Path) -> str:
    """Output of the command, which must succeed."""
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.thorough
def test_a_run_and_its_export_give_the_same_figures(workspace: Path) -> None:
    texts = ["--text", workspace / "a.txt", "--text", workspace / "b.txt", "--resamples", "20"]
    output = evaluate(
        "--run",
        workspace / "run",
        *texts,
        "--harness",
        "--json",
        workspace / "run.json",
        "--plot",
        workspace / "run.png",
    )
    evaluate("--model", workspace / "hf", *texts, "--json", workspace / "hf.json")
    run, exported = (json.loads((workspace / f"{name}.json").read_text()) for name in ("run", "hf"))
    assert (
        set(run["domains"]) == {"a.txt", "b.txt"} and run["step"] == 3 and exported["step"] is None
    )
    for figures in (*run["domains"].values(), run["total"]):
        assert figures.keys() >= FIXED
    assert run["total"]["bpb_with_eod"] == pytest.approx(
        exported["total"]["bpb_with_eod"], rel=1e-6
    )
    assert "bits_per_byte" in output and "bootstrap of documents" in output and "with EOD" in output
    assert (workspace / "run.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough
def test_all_checkpoints_as_a_curve(workspace: Path) -> None:
    output = evaluate(
        "--run",
        workspace / "run",
        "--text",
        workspace / "b.txt",
        "--all-steps",
        "--json",
        workspace / "curve.json",
        "--plot",
        workspace / "c.svg",
    )
    curve = json.loads((workspace / "curve.json").read_text())
    assert [at["step"] for at in curve["checkpoints"]] == [3] and curve["checkpoints"][0][
        "total"
    ] == curve["total"]
    assert "bits/byte at every checkpoint" in output and "<svg" in (workspace / "c.svg").read_text()


@pytest.mark.thorough
def test_tasks_at_one_checkpoint_and_over_all(workspace: Path) -> None:
    make_run(workspace / "two", max_position=512)
    output = evaluate(
        "--run",
        workspace / "two",
        "--text",
        workspace / "a.txt",
        "--tasks",
        "--items",
        "5",
        "--json",
        workspace / "tasks.json",
        "--plot",
        workspace / "tasks.svg",
    )
    result = json.loads((workspace / "tasks.json").read_text())
    assert set(result["tasks"]) == {
        "arithmetic",
        "copying",
        "brackets",
        "induction",
        "cloze",
    } and all(name in output for name in result["tasks"])
    assert "<svg" in (workspace / "tasks.svg").read_text()
    checkpoint_of(
        *load_model(open_run(workspace / "two")), workspace / "two" / "checkpoints", step=7
    )
    output = evaluate(
        "--run",
        workspace / "two",
        "--text",
        workspace / "a.txt",
        "--task",
        "induction",
        "--items",
        "5",
        "--all-steps",
        "--json",
        workspace / "curve.json",
        "--plot",
        workspace / "curve.png",
    )
    curve = json.loads((workspace / "curve.json").read_text())
    assert [at["step"] for at in curve["checkpoints"]] == [3, 7] and "at every checkpoint" in output
    assert (
        curve["checkpoints"][0]["tasks"] == curve["tasks"]
        and curve["tasks"]["induction"] == result["tasks"]["induction"]
    )


@pytest.mark.thorough
def test_free_running(workspace: Path) -> None:
    output = evaluate(
        "--model",
        workspace / "hf",
        "--text",
        workspace / "a.txt",
        "--exposure-bias",
        "--prefix",
        "4",
        "--continuation",
        "12",
        "--resamples",
        "20",
        "--json",
        workspace / "free.json",
        "--plot",
        workspace / "free.svg",
    )
    result = json.loads((workspace / "free.json").read_text())
    assert f"{result['total']['drift']['value']:+.3f}" in output and "a.txt, sampled" in output
    assert (
        result["protocol"]["continuation"] == 12 and "<svg" in (workspace / "free.svg").read_text()
    )


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --run, a run folder, or --model"),
        (["--run", "run", "--text", "a.txt", "--data", "d"], "give either --data or --text"),
        (["--model", "hf"], "name the documents to score with --text FILE or --data FOLDER"),
        (["--model", "hf", "--text", "a.txt", "--step", "3"], "a Hugging Face folder is one model"),
        (["--run", "run", "--step", "3", "--all-steps"], "give either --step or --all-steps"),
        (
            ["--run", "run", "--text", "a.txt", "--plot", "x.docx"],
            "x.docx must end in .png, .svg, .pdf",
        ),
        (["--run", "run", "--text", "absent"], "absent cannot be read: No such file"),
        (["--run", "run", "--data", "."], ". has no validation_text/*.jsonl"),
        (
            ["--run", "run", "--text", "a.txt", "--window", "9999"],
            "window = 9999 must be between 2 and",
        ),
        (
            ["--run", "run", "--text", "a.txt", "--prefix", "4"],
            "--prefix and --continuation are for --exposure-bias",
        ),
        (
            ["--run", "run", "--exposure-bias", "--all-steps", "--tasks"],
            "--all-steps, tasks cannot be given with --exposure-bias",
        ),
        (["--run", "run", "--tasks", "--harness"], "--harness cannot be given with tasks"),
        (
            ["--run", "run", "--task", "chess"],
            "there is no task 'chess'; there are arithmetic, copying",
        ),
        (["--run", "run", "--lm-eval-path", "."], "--lm-eval-path is for --lm-eval TASK"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_user_errors_end_with_one_line(
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(workspace)
    result = CliRunner().invoke(app, ["eval", *arguments])
    assert result.exit_code == 2
    error = result.stderr.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and message in error[0]
