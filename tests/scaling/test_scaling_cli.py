"""`nextpt scaling fit`, `predict` and `plan`: files, results, and one line for each user error."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from matplotlib.figure import Figure
from typer.testing import CliRunner

from launcher.cli import app
from nextpt.scaling.fitting import Fit
from nextpt.scaling.laws import CHINCHILLA
from nextpt.scaling.plots import plot_losses
from nextpt.scaling.record import read_fit

TRUE = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
COLUMNS = ("--params-column", "N", "--tokens-column", "D", "--loss-column", "loss")


def scaling(*arguments: object) -> Result:
    return CliRunner(env=os.environ | {"COLUMNS": "100"}).invoke(
        app, ["scaling", *map(str, arguments)]
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scaling") / "runs.csv"
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 6)))
    noise = np.exp(0.002 * np.random.default_rng(0).standard_normal(len(n)))
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["N", "D", "C", "loss"])
        writer.writerows(zip(n, d, 6 * n * d, CHINCHILLA.loss(TRUE, n, d) * noise, strict=True))
    return path


@pytest.fixture(scope="module")
def fitted(table: Path) -> Path:
    path = table.with_name("fit.json")
    result = scaling(
        "fit",
        table,
        *COLUMNS,
        "--bootstrap",
        300,
        "--json",
        path,
        "--plot",
        path.with_suffix(".svg"),
    )
    assert result.exit_code == 0, result.output
    return path


@pytest.mark.thorough
def test_help() -> None:
    for command in ("fit", "predict", "plan", "sweep"):
        result = scaling(command, "--help")
        assert result.exit_code == 0 and f"example: nextpt scaling {command}" in result.stdout


@pytest.mark.thorough
def test_fit_writes_constants_intervals_and_a_plot(fitted: Path) -> None:
    values = json.loads(fitted.read_text())
    for name, true in TRUE.items():
        low, high = values["intervals"][name]
        assert low < values[name] < high and low < true < high, name
    assert values["N_c"] == pytest.approx(values["A"] ** (1 / values["alpha"]))
    assert (
        values["runs"]["count"] == 30
        and len(values["resamples"]["A"]) == 300
        and values["sensitivity"][0]["what"] == "all runs"
    )
    assert fitted.with_suffix(".svg").read_text().count("<path") > 30


def test_flops_give_the_same_as_tokens(table: Path, fitted: Path) -> None:
    other = table.with_name("flops.json")
    result = scaling(
        "fit",
        table,
        "--params-column",
        "N",
        "--flops-column",
        "C",
        "--loss-column",
        "loss",
        "--bootstrap",
        0,
        "--json",
        other,
    )
    assert result.exit_code == 0 and json.loads(other.read_text())["intervals"] is None
    assert json.loads(other.read_text())["A"] == pytest.approx(
        json.loads(fitted.read_text())["A"], rel=1e-6
    )
    answer = json.loads(
        scaling("predict", other, "--params", 1e9, "--tokens", 1e10, "--json").stdout
    )
    assert answer["interval"] is None and answer["loss"] == pytest.approx(
        float(CHINCHILLA.loss(TRUE, 1e9, 1e10)), rel=0.01
    )


def test_predict_gives_an_interval_and_warns_outside(fitted: Path) -> None:
    inside = json.loads(
        scaling("predict", fitted, "--params", 1e8, "--tokens", 1e10, "--json").stdout
    )
    assert (
        inside["warnings"] == [] and inside["interval"][0] < inside["loss"] < inside["interval"][1]
    )
    far = scaling("predict", fitted, "--params", 70e9, "--tokens", 1.4e12)
    assert far.exit_code == 0 and "extrapolation" in far.stdout and "form of the law" in far.stdout
    assert (
        "tokens per parameter are outside"
        in scaling("predict", fitted, "--params", 1e9, "--tokens", 1e6).stdout
    )


def test_plan_of_gpu_hours_is_that_of_its_flops(fitted: Path) -> None:
    hours = json.loads(
        scaling(
            "plan", fitted, "--gpu-hours", 1000, "--device", "h100", "--utilisation", 0.5, "--json"
        ).stdout
    )
    assert hours["flops"] == pytest.approx(1000 * 3600 * 989e12 * 0.5, rel=1e-3)
    flops = json.loads(scaling("plan", fitted, "--flops", hours["flops"], "--json").stdout)
    assert flops["parameters"] == hours["parameters"] and 6 * flops["parameters"] * flops[
        "tokens"
    ] == pytest.approx(flops["flops"])
    low, high = flops["parameters_interval"]
    assert low < flops["parameters"] < high and flops["price"][0]["share"] == 1
    output = scaling("plan", fitted, "--flops", 1e24).stdout
    assert "extrapolation" in output and "over-training" in output and "…" not in output


@pytest.mark.thorough
def test_other_forms_write_their_results(table: Path) -> None:
    for form, name in (("kaplan", "alpha_N"), ("over-training", "alpha"), ("envelope", "a")):
        path = table.with_name(f"{form}.json")
        result = scaling("fit", table, *COLUMNS, "--form", form, "--bootstrap", 20, "--json", path)
        assert result.exit_code == 0, result.output
        assert 0 < json.loads(path.read_text())[name] < 1
        assert scaling("plan", path, "--flops", 1e20).exit_code == 0
    assert (
        "gives optimal sizes and no losses"
        in scaling(
            "predict", table.with_name("envelope.json"), "--params", 1e8, "--tokens", 1e9
        ).stderr
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loss": "nan"}, r"runs\.csv line 3: loss = 'nan'; loss must be a finite number above 0"),
        ({"loss": "-2.5"}, r"line 3: loss = '-2\.5'"),
        ({"N": ""}, r"line 3: N = ''; parameters must"),
        ({"D": "many"}, r"line 3: D = 'many'; tokens must"),
    ],
)
def test_bad_cells_are_named(
    table: Path, tmp_path: Path, changed: dict[str, str], message: str
) -> None:
    rows = list(csv.DictReader(table.open()))
    rows[1] |= changed
    bad, target = tmp_path / "runs.csv", tmp_path / "fit.json"
    with open(bad, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    check_refused(scaling("fit", bad, *COLUMNS, "--json", target), message)
    assert not target.exists()


def check_refused(result: Result, message: str) -> None:
    assert result.exit_code == 2 and re.search(message, result.stderr), result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--params-column", "n", "--tokens-column", "D", "--loss-column", "loss"),
            "no column 'n'; the nearest is 'N'",
        ),
        (
            ("--params-column", "N", "--tokens-column", "D", "--loss-column", "val_loss"),
            "no column 'val_loss'; the nearest is 'loss'",
        ),
        (
            ("--params-column", "N", "--loss-column", "loss"),
            "either --tokens-column or --flops-column",
        ),
        (("--tokens-column", "D"), "name its columns"),
        ((*COLUMNS, "--drop-highest", "26"), "4 runs are too few"),
        ((*COLUMNS, "--drop-highest", "30"), "leaves none"),
        ((*COLUMNS, "--form", "cubic"), "known are chinchilla"),
        ((*COLUMNS, "--form", "repeated"), "needs --unique-column"),
        ((*COLUMNS, "--form", "isoflop"), "approach 2 needs"),
        ((*COLUMNS, "--plot", "picture.gif"), "must end in"),
        ((*COLUMNS, "--json", "/nowhere/fit.json"), "/nowhere/fit.json cannot be written"),
    ],
)
def test_user_errors_of_fit(table: Path, arguments: tuple[str, ...], message: str) -> None:
    check_refused(scaling("fit", table, "--bootstrap", 0, *arguments), message)


def test_the_unit_of_a_loss_is_that_of_its_column(table: Path, fitted: Path) -> None:
    """A column may hold bits per byte: nothing says that it holds nats."""
    result = scaling("predict", fitted, "--params", 1e9, "--tokens", 1e10)
    assert "as in column 'loss'" in result.output and "nats" not in result.output
    fit = read_fit(fitted)
    assert isinstance(fit, Fit)
    figure = Figure()
    plot_losses(figure.subplots(), fit, figure)
    assert figure.axes[0].get_ylabel() == "loss, as in column 'loss'"


@pytest.mark.thorough
def test_user_errors_of_predict_and_plan(table: Path, fitted: Path, tmp_path: Path) -> None:
    check_refused(
        scaling("fit", tmp_path / "none.csv", *COLUMNS), "none.csv cannot be read: No such file"
    )
    check_refused(scaling("fit", tmp_path), "is not a run folder")
    check_refused(scaling("predict", table, "--params", 1, "--tokens", 1), "is not JSON")
    (tmp_path / "nested.json").write_text("[" * 100_000)
    check_refused(scaling("plan", tmp_path / "nested.json", "--flops", 1e20), "is not JSON")
    (tmp_path / "other.json").write_text('{"form": "chinchilla"}')
    check_refused(scaling("plan", tmp_path / "other.json", "--flops", 1e20), "is not a fit")
    check_refused(scaling("plan", fitted), "either --flops or --gpu-hours")
    check_refused(scaling("plan", fitted, "--flops", 0), "must be above 0")
    check_refused(scaling("predict", fitted, "--params", -1, "--tokens", 1), "must be above 0")
