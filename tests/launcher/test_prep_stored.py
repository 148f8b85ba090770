"""`nextpt prep export` and `nextpt prep upload` on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli import app


@pytest.mark.thorough
def test_export_prints_the_arguments_of_megatron(dataset: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["prep", "export", "--megatron", str(dataset), "--output", str(tmp_path / "x")]
    )
    assert result.exit_code == 0, result.output
    assert f"{tmp_path}/x-prose-validation.bin/.idx: " in result.output
    weights = result.output.partition("--data-path ")[2].split()
    assert (
        int(weights[0]) == (tmp_path / "x-code-train.bin").stat().st_size // 2
        and weights[1] == f"{tmp_path}/x-code-train"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "DATA", "--output", "x"], "--megatron"),
        (["export", "--megatron", "nowhere", "--output", "x"], "nowhere is not there"),
        (["upload", "DATA", "nosuch://place"], "expected a path, s3://"),
    ],
)
def test_user_errors_end_with_one_line(dataset: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(
        app, ["prep", *(str(dataset) if a == "DATA" else a for a in arguments)]
    )
    assert (
        result.exit_code == 2
        and result.stderr.count("\n") == 1
        and result.stderr.startswith("error: ")
        and message in result.stderr
    )


def test_upload_counts_what_it_sent(dataset: Path, tmp_path: Path) -> None:
    arguments = ["prep", "upload", str(dataset), str(tmp_path / "copy")]
    assert "files, " in CliRunner().invoke(app, arguments).output
    assert "4 shards were there already" in CliRunner().invoke(app, arguments).output
