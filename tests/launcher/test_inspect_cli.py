"""`nextpt inspect`: output, files, and user errors in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli import app
from tests.support.runs import make_run

TEXT = "The quick brown fox\n" * 12  # longer than the context


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect") / "run"
    make_run(folder)
    return folder


def nextpt(*arguments: object):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)], env={"COLUMNS": "160"})


@pytest.mark.thorough
def test_a_file_is_inspected(run: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT)
    result = nextpt("--run", run, "--text", tmp_path / "t.txt", "--top", 3)
    assert result.exit_code == 0, result.output
    inspection = json.loads((run / "inspect" / "inspect.json").read_text())
    assert (
        inspection["total"]["bytes"] == len(TEXT)
        and inspection["total"]["tokens"] == len(inspection["tokens"]) > inspection["window"] == 40
    )
    assert "".join(t["text"] for t in inspection["tokens"]) == TEXT
    assert inspection["total"]["nats_per_token"] == pytest.approx(
        sum(t["nats"] for t in inspection["tokens"]) / len(inspection["tokens"])
    )
    assert (
        inspection["calibration"]["positions"] == len(inspection["tokens"])
        and len(inspection["following"]["alternatives"]) == 8
    )
    assert (
        f"{len(inspection['tokens'])} tokens, {len(TEXT)} bytes:"
        f" {inspection['total']['nats_per_token']:.3f} nats" in result.stdout
    )
    most = max(inspection["tokens"], key=lambda t: t["nats"])
    assert f"{most['rank']:,}" in result.stdout and "calibration.svg" in result.stdout


@pytest.mark.thorough
def test_calibration_on_held_out_documents(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # data.path of the run is "none"
    documents = [TEXT[:200], "", "It's 12345 o'clock"]
    (tmp_path / "none" / "validation_text").mkdir(parents=True)
    (tmp_path / "none" / "validation_text" / "d.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in documents)
    )
    result = nextpt("--run", run, "--prompt", "a fox", "--validation", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    inspection = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert (
        inspection["source"] == "the prompt" and inspection["calibrated_on"] == "held-out documents"
    )
    assert inspection["calibration"]["positions"] > len(inspection["tokens"])
    (tmp_path / "none" / "validation_text" / "d.jsonl").write_text('{"text": ""}\n')
    assert (
        "the held-out documents of none hold no text"
        in nextpt("--run", run, "--prompt", "a fox", "--validation").stderr
    )


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the text with one of --text FILE and --prompt TEXT"),
        (["--text", "a", "--prompt", "b"], "give the text with one of"),
        (["--prompt", ""], "the prompt is empty"),
        (["--text", "none.txt"], "none.txt cannot be read: No such file"),
        (["--text", "bad.txt"], "bad.txt is not UTF-8: invalid start byte at byte 2"),
        (["--prompt", "a\udcff"], "the prompt is not UTF-8"),
        (["--prompt", "a", "--validation"], "none has no validation_text"),
        (["--prompt", "a", "--output", "bad.txt/x"], "bad.txt/x cannot be written"),
    ],
)
def test_user_errors_end_with_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    result = nextpt("--run", run, *arguments)
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
