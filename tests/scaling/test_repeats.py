"""Scaling law of repeated data: recovery, constants held fixed, bounds, predictions and plans."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from launcher.cli import app
from nextpt.base.errors import ScalingError
from nextpt.scaling.allocation import optimum
from nextpt.scaling.laws import CHINCHILLA
from nextpt.scaling.observations import Runs
from nextpt.scaling.predict import plan_budget, predict
from nextpt.scaling.record import read_fit, repeated_json, write_json
from nextpt.scaling.repeats import HALF_LIVES, RepeatedFit, fit_repeated, loss

# Muennighoff et al., arXiv 2305.16264, with the half-lives of their published fit
TRUE = {
    "A": 521.0,
    "B": 1488.0,
    "E": 1.87,
    "alpha": 0.35,
    "beta": 0.35,
    "R_N": 5.32,
    "R_D": 15.37,
}
FIVE = {name: TRUE[name] for name in CHINCHILLA.constants}
COLUMNS = (
    *("--params-column", "N", "--tokens-column", "D", "--loss-column", "loss"),
    *("--unique-column", "U", "--form", "repeated"),
)


def repeated_runs(noise: float = 0.0, **constants: float) -> tuple[Runs, np.ndarray]:
    """Runs of the law, and the epochs of each."""
    n, unique, epochs = (
        values.ravel()
        for values in np.meshgrid(
            np.geomspace(1e7, 1e10, 6), np.geomspace(1e9, 1e11, 5), [1, 2, 4, 16, 60]
        )
    )
    values = loss(TRUE | constants, n, unique * epochs, unique)
    values = values * np.exp(noise * np.random.default_rng(0).standard_normal(len(n)))
    return Runs(n, unique * epochs, values, [""] * len(n), "", unique), epochs


def test_repeated_data_recovers_its_half_lives() -> None:
    runs, epochs = repeated_runs()
    law_fit = fit_repeated(runs)
    assert law_fit.constants == pytest.approx(TRUE, rel=1e-6) and law_fit.notes == []
    # Two epochs hardly determine where repetition stops helping
    once = fit_repeated(runs.only(epochs <= 2))
    assert once.constants["R_D"] == pytest.approx(15.37, rel=1e-3)
    with pytest.raises(ScalingError, match="repeat their data"):
        fit_repeated(runs.only(epochs == 1))


def test_half_lives_are_fitted_with_the_other_constants_held() -> None:
    """As the paper does: no run of one epoch is needed then."""
    runs, epochs = repeated_runs(noise=0.002)
    law_fit = fit_repeated(runs.only(epochs > 1), fixed=FIVE, bootstrap=50)
    assert {name: law_fit.constants[name] for name in FIVE} == FIVE
    assert law_fit.constants["R_D"] == pytest.approx(15.37, rel=0.05)
    assert law_fit.constants["R_N"] == pytest.approx(5.32, rel=0.05)
    values = repeated_json(law_fit)
    assert values["fixed"] == FIVE and values["intervals"]["A"] is None
    assert values["intervals"]["R_D"][0] < 15.37 < values["intervals"]["R_D"][1]


@pytest.mark.parametrize("fixed", [{"A": 521.0}, {"B": 1488.0, "beta": 0.35}, {"R_N": 5.32}])
def test_some_constants_are_held_and_the_others_recovered(fixed: dict[str, float]) -> None:
    law_fit = fit_repeated(repeated_runs()[0], fixed=fixed)
    assert law_fit.constants == pytest.approx(TRUE, rel=1e-5)
    assert {name: law_fit.constants[name] for name in fixed} == fixed


def test_a_bound_that_binds_is_reported_and_its_interval_is_open() -> None:
    """Further parameters are worth as much as the first: no half-life describes them."""
    runs, _ = repeated_runs(noise=0.01, R_N=1e7)
    law_fit = fit_repeated(runs, fixed=FIVE, bootstrap=60)
    assert law_fit.constants["R_N"] == pytest.approx(HALF_LIVES[1])
    assert any("R_N = 1000 is the upper bound of the search" in note for note in law_fit.notes)
    assert any("R_N: its interval is open upwards" in note for note in law_fit.notes)
    assert not any("R_D" in note for note in law_fit.notes)
    low, high = repeated_json(law_fit)["intervals"]["R_N"]
    assert low > 20 and high is None


def test_an_interval_that_only_ends_at_a_bound_reaches_below_it() -> None:
    """Noise hides whether further parameters are worth less: some resamples say so, some not."""
    runs, epochs = repeated_runs(noise=0.03, R_N=300.0)
    law_fit = fit_repeated(runs.only(epochs > 1), fixed=FIVE, bootstrap=60)
    low, high = repeated_json(law_fit)["intervals"]["R_N"]
    assert low < 300 and (high is None or high < HALF_LIVES[1])


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        ({"gamma": 1.0}, "the constants are A, B, E"),
        ({"R_D": -1.0}, "above 0"),
        (TRUE, "nothing is left to fit"),
    ],
)
def test_constants_that_cannot_be_held_are_refused(fixed: dict[str, float], message: str) -> None:
    with pytest.raises(ScalingError, match=message):
        fit_repeated(repeated_runs()[0], fixed=fixed)


def test_the_plan_is_the_least_loss_of_a_corpus() -> None:
    law_fit = RepeatedFit(repeated_runs()[0], TRUE, 0.0, 1e-3, {}, [])
    # Unlimited data: Chinchilla's own allocation
    budget = 1e22
    free = plan_budget(law_fit.on(1e15), budget, 0.9, 1e15)
    expected = float(optimum(CHINCHILLA, TRUE, budget)[0])
    assert free["parameters"] == pytest.approx(expected, rel=1e-3) and free["epochs"] == 1
    unique = 1e10
    plan = plan_budget(law_fit.on(unique), budget, 0.9, unique)
    sizes = np.geomspace(1e7, 1e13, 200_001)
    losses = loss(TRUE, sizes, budget / 6 / sizes, unique)
    assert plan["parameters"] == pytest.approx(sizes[losses.argmin()], rel=1e-3)
    assert plan["loss"]["loss"] == pytest.approx(losses.min(), rel=1e-9)
    assert plan["loss"]["loss"] > free["loss"]["loss"] and plan["epochs"] > 1
    far = predict(law_fit.on(unique), 1e9, 100 * unique, 0.9, unique)
    assert any("100 epochs are more than those fitted" in warning for warning in far["warnings"])


def test_a_fit_keeps_what_was_held_and_is_read_without_it(tmp_path: Path) -> None:
    law_fit = fit_repeated(repeated_runs(noise=0.002)[0], fixed=FIVE, bootstrap=20)
    values = repeated_json(law_fit)
    write_json(values, tmp_path / "fit.json")
    restored = read_fit(tmp_path / "fit.json")
    assert isinstance(restored, RepeatedFit) and restored.fixed == FIVE
    assert restored.constants == law_fit.constants
    # Files of older versions
    write_json({k: v for k, v in values.items() if k not in ("fixed", "bounds")}, tmp_path / "old")
    older = read_fit(tmp_path / "old")
    assert isinstance(older, RepeatedFit) and older.fixed == {}


def scaling(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["scaling", *map(str, arguments)])


def test_fit_predict_and_plan_of_repeated_data(tmp_path: Path) -> None:
    runs, _ = repeated_runs(noise=0.002)
    assert runs.unique_tokens is not None
    table, path = tmp_path / "runs.csv", tmp_path / "fit.json"
    with open(table, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["N", "D", "U", "loss"])
        writer.writerows(
            zip(runs.parameters, runs.tokens, runs.unique_tokens, runs.loss, strict=True)
        )
    fixes = [text for name, value in FIVE.items() for text in ("--fix", f"{name}={value}")]
    fitted = scaling("fit", table, *COLUMNS, *fixes, "--bootstrap", 30, "--json", path)
    assert fitted.exit_code == 0, fitted.output
    assert "held, not fitted: A = 521" in fitted.output
    unique = ("--unique-tokens", 1e10)
    predicted = scaling("predict", path, "--params", 1e9, "--tokens", 4e10, *unique, "--json")
    values = json.loads(predicted.output)
    assert values["epochs"] == 4
    assert values["loss"] == pytest.approx(float(loss(TRUE, 1e9, 4e10, 1e10)), rel=2e-3)
    assert values["interval"][0] < values["loss"] < values["interval"][1]
    planned = scaling("plan", path, "--flops", 1e21, *unique)
    assert planned.exit_code == 0 and "of 1e+10 unique tokens" in planned.output
    for arguments, message in (
        (("predict", path, "--params", 1e9, "--tokens", 4e10), "needs --unique-tokens"),
        (("plan", path, "--flops", 1e21), "needs --unique-tokens"),
        (("fit", table, *COLUMNS, "--fix", "R_D"), "expected NAME=VALUE"),
        (("fit", table, *COLUMNS, "--fix", "R_D=1", "--fix", "R_D=2"), "given twice"),
        (("fit", table, *COLUMNS[:6], "--fix", "A=1"), "is for --form repeated"),
    ):
        refused = scaling(*arguments)
        assert refused.exit_code == 2 and message in " ".join(refused.output.split())
