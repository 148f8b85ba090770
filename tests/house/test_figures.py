"""Figures that several pages name come from one file; a page that says otherwise is seen."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "figures.py"
SOURCE = """
figures:
  loss: {value: "2.50", source: the command and the machine}
  steps: {value: "1,200", source: the same run}
pages:
  page.md: ["a loss of {loss} after {steps}."]
"""


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, on one page and one file of its own."""
    spec = importlib.util.spec_from_file_location("figures", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "figures.yaml").write_text(SOURCE)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "SOURCE", tmp_path / "figures.yaml")
    return module


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["figures.py", *arguments])
    code: int = script.main()
    return code


def test_other_figures_are_seen_and_written(
    figures: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = tmp_path / "page.md"
    page.write_text("It has a loss of 2.61 after 1,000. And 2.61 elsewhere.")
    assert run(figures, monkeypatch, "--check") == 1
    assert "page.md has other figures than figures.yaml" in capsys.readouterr().out
    assert "2.61 after" in page.read_text()
    assert run(figures, monkeypatch) == 0
    assert page.read_text() == "It has a loss of 2.50 after 1,200. And 2.61 elsewhere."
    assert run(figures, monkeypatch, "--check") == 0


@pytest.mark.parametrize("text", ["Nothing of it.", "a loss of 1 after 2. a loss of 1 after 2."])
def test_a_text_that_is_missing_or_twice_there_is_an_error(
    figures: ModuleType,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "page.md").write_text(text)
    assert run(figures, monkeypatch) == 1
    assert "times and not once: 'a loss of {loss}" in capsys.readouterr().out
    assert (tmp_path / "page.md").read_text() == text
