"""Fits of scaling laws: published data and results, exact laws, and laws with known noise."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from nextpt.base.errors import ScalingError
from nextpt.scaling.allocation import interval, optimum, predictions, price
from nextpt.scaling.checks import sensitivity, warnings
from nextpt.scaling.fitting import fit, nnls
from nextpt.scaling.frontier import envelope, isoflop
from nextpt.scaling.laws import CHINCHILLA, KAPLAN, LAWS, OVER_TRAINING, Law
from nextpt.scaling.observations import Runs, drop_highest_losses, read_csv
from nextpt.scaling.plots import plot_fit, plot_valleys
from nextpt.scaling.predict import predict
from nextpt.scaling.record import fit_json, read_fit

DATA = Path(os.environ.get("NEXTPT_TEST_DATA", "/nowhere")) / "scaling"
published = pytest.mark.skipif(
    not DATA.is_dir(), reason="NEXTPT_TEST_DATA does not name a folder with scaling/"
)
TRUE = {
    "chinchilla": {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28},
    "over-training": {"A": 166.0, "B": 287.0, "E": 1.84, "alpha": 0.273},
    "kaplan": {"N_c": 8.8e13, "D_c": 5.4e13, "alpha_N": 0.076, "alpha_D": 0.095},
}


def chinchilla_runs() -> Runs:
    return read_csv(
        DATA / "chinchilla_fig4_epoch.csv",
        parameters="Model Size",
        flops="Training FLOP",
        loss="loss",
    )


def synthetic_runs(
    law: Law, noise: float = 0.0, seed: int = 0, sizes: int = 6, tokens: int = 6
) -> Runs:
    n, d = (
        a.ravel()
        for a in np.meshgrid(np.geomspace(1e7, 1e9, sizes), np.geomspace(1e9, 1e11, tokens))
    )
    loss = law.loss(TRUE[law.name], n, d) * np.exp(
        noise * np.random.default_rng(seed).standard_normal(len(n))
    )
    return Runs(n, d, loss, [f"run {i}" for i in range(len(n))], "made")


@published
@pytest.mark.parametrize(
    ("delta", "expected"),
    [
        (1e-3, (477.83, 2143.4, 1.8172, 0.3473, 0.3672)),
        (0.0, (482.0, 2085.4, 1.8169, 0.3478, 0.3659)),
    ],
)
def test_240_published_runs(delta: float, expected: tuple[float, ...]) -> None:
    """ArXiv 2404.10102: Huber loss, and least absolute deviations as in its published constants."""
    runs = drop_highest_losses(chinchilla_runs(), 5)
    assert len(runs) == 240
    assert tuple(fit(CHINCHILLA, runs, delta=delta).constants.values()) == pytest.approx(
        expected, rel=1e-3
    )


@pytest.mark.thorough
@published
def test_published_intervals() -> None:
    """ArXiv 2404.10102, 4000 resamples of 240 runs."""
    law_fit = fit(CHINCHILLA, drop_highest_losses(chinchilla_runs(), 5), bootstrap=4000)
    expected = {
        "A": (285.2, 743.6),
        "B": (1042.4, 5810.3),
        "E": (1.769, 1.871),
        "alpha": (0.317, 0.373),
        "beta": (0.331, 0.415),
    }
    assert law_fit.resampled == "runs"
    for name, ends in expected.items():
        assert interval(law_fit.resamples[name], 0.95) == pytest.approx(ends, rel=0.02), name


@published
def test_outliers_move_beta() -> None:
    law_fit = fit(CHINCHILLA, chinchilla_runs())
    assert len(law_fit.runs) == 245 and law_fit.constants["beta"] == pytest.approx(0.4530, abs=1e-4)
    variants = {variant.what: variant for variant in sensitivity(law_fit)}
    assert variants["without the 5 highest losses"].constants["beta"] == pytest.approx(
        0.3672, abs=1e-4
    )


@published
def test_approaches_1_and_2_agree_with_the_paper() -> None:
    """Hoffmann et al., table 2, from points read off a figure.

    N grows as C^0.50 (0.488 to 0.502) and C^0.49 (0.462 to 0.534).
    """
    runs = drop_highest_losses(chinchilla_runs(), 5)
    assert isoflop(runs).a == pytest.approx(0.49, abs=0.045)
    assert envelope(runs).a == pytest.approx(0.50, abs=0.045)


@published
def test_gadre_predicts_over_trained_models() -> None:
    """ArXiv 2403.08540: five small runs on RedPajama predict the C4 loss of two large ones.

    1.4B at 640 tokens per parameter to 0.71 %, 6.9B at 20 to 0.73 %.
    """
    import csv

    with open(DATA / "gadre_losses.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["dataset"] == "rpj"]
    n, d, loss, times = (
        np.array([float(row[key]) for row in rows]) for key in ("N", "D", "loss_c4_val", "mult")
    )
    runs = Runs(n, d, loss, [row["name"] for row in rows], "published")
    small = runs.only((n < 5e8) & (times == 1) | (n < 2e7) & (times == 16))
    assert len(small) == 5
    law_fit = fit(OVER_TRAINING, small)
    errors = [
        abs(float(law_fit.loss(n[i], d[i])) / loss[i] - 1)
        for i in np.flatnonzero((n > 1e9) & ((n > 5e9) | (times == 32)))
    ]
    assert sorted(errors) == pytest.approx([0.007103, 0.007320], abs=5e-7)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_exact_runs_recover_the_law(law: Law) -> None:
    law_fit = fit(law, synthetic_runs(law))
    assert law_fit.constants == pytest.approx(TRUE[law.name], rel=1e-6)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_slopes_are_those_of_the_loss(law: Law) -> None:
    rng = np.random.default_rng(1)
    terms = law.terms(rng.standard_normal(7), rng.standard_normal(7))
    theta = rng.uniform(0.2, 0.8, (3, len(law.constants)))
    step = 1e-6
    for i in range(theta.shape[1]):
        moved = np.eye(theta.shape[1])[i] * step
        numeric = (
            law.log_loss(theta + moved, terms)[0] - law.log_loss(theta - moved, terms)[0]
        ) / (2 * step)
        assert law.log_loss(theta, terms)[1][:, :, i] == pytest.approx(numeric, abs=1e-8)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_the_optimum_is_the_least_loss_of_the_budget(law: Law) -> None:
    best, tokens = optimum(law, TRUE[law.name], 1e21)
    assert 6 * best * tokens == pytest.approx(1e21)
    others = best * np.geomspace(0.5, 2, 101)
    losses = law.loss(TRUE[law.name], others, 1e21 / 6 / others)
    assert np.argmin(losses) == 50


@pytest.mark.thorough
def test_intervals_cover_the_truth_and_the_next_run() -> None:
    """20 noisy ladders of 36 runs: coverage of the intervals.

    About 95 % contain beta, and about 90 % the loss of a run 30 times as large.
    """
    inside = {"beta": 0, "loss": 0}
    truth = float(CHINCHILLA.loss(TRUE["chinchilla"], 5e9, 6e11))
    for seed in range(20):
        law_fit = fit(CHINCHILLA, synthetic_runs(CHINCHILLA, noise=0.003, seed=seed), bootstrap=200)
        low, high = interval(law_fit.resamples["beta"], 0.95)
        inside["beta"] += low < TRUE["chinchilla"]["beta"] < high
        low, high = interval(predictions(law_fit, 5e9, 6e11), 0.90)
        inside["loss"] += (
            low
            < truth * np.exp(0.003 * np.random.default_rng(1000 + seed).standard_normal())
            < high
        )
    assert inside["beta"] >= 16 and inside["loss"] >= 15


def test_few_runs_resample_residuals() -> None:
    law_fit = fit(
        CHINCHILLA, synthetic_runs(CHINCHILLA, noise=0.002, sizes=3, tokens=3), bootstrap=200
    )
    assert law_fit.resampled == "residuals" and all(
        np.isfinite(values).all() for values in law_fit.resamples.values()
    )


def test_smaller_models_cost_more_for_the_same_loss() -> None:
    law_fit = fit(CHINCHILLA, synthetic_runs(CHINCHILLA))
    priced = price(law_fit, 1e21)
    reached = [row for row in priced if row.same_loss_tokens is not None]
    assert len(reached) >= 4 and all(a.loss < b.loss for a, b in pairwise(priced))
    assert all(a.same_loss_flops < b.same_loss_flops for a, b in pairwise(reached))
    for row in reached:
        assert float(law_fit.loss(row.parameters, row.same_loss_tokens)) == pytest.approx(
            priced[0].loss, rel=1e-9
        )


@pytest.mark.thorough
def test_warnings_name_what_the_runs_do_not_determine() -> None:
    runs = synthetic_runs(CHINCHILLA, noise=0.003)
    assert warnings(fit(CHINCHILLA, runs)) == []
    few = runs.only(np.isin(runs.parameters, np.unique(runs.parameters)[[0, -1]]))
    assert any("only 2 model sizes" in line for line in warnings(fit(CHINCHILLA, few)))
    n = np.geomspace(1e7, 1e9, 12)
    line = Runs(
        n,
        20 * n,
        CHINCHILLA.loss(TRUE["chinchilla"], n, 20 * n) * (1 + 0.003 * np.cos(np.arange(12.0) ** 2)),
        [""] * 12,
        "",
    )
    messages = warnings(fit(CHINCHILLA, line))
    assert any("one D/N" in text for text in messages) and any(
        "is not determined" in text for text in messages
    )


def test_approaches_1_and_2_find_a_known_exponent() -> None:
    """Beta / (alpha + beta) = 0.4516.

    Parabolas of asymmetric valleys are biased a little, and so are steps between sizes.
    """
    exponent = 0.28 / 0.62
    c, share = (
        a.ravel() for a in np.meshgrid(np.geomspace(1e18, 1e21, 6), np.geomspace(0.3, 3, 7))
    )
    n = share * np.array([optimum(CHINCHILLA, TRUE["chinchilla"], budget)[0] for budget in c])
    runs = Runs(n, c / 6 / n, CHINCHILLA.loss(TRUE["chinchilla"], n, c / 6 / n), [""] * len(n), "")
    frontier = isoflop(runs, bootstrap=50)
    assert (
        len(frontier.optima) == 6
        and frontier.a == pytest.approx(exponent, abs=0.005)
        and len(frontier.resamples) == 50
    )
    n, d = (
        a.ravel() for a in np.meshgrid(np.geomspace(1e7, 1e10, 20), np.geomspace(1e8, 1e12, 60))
    )
    assert envelope(
        Runs(n, d, CHINCHILLA.loss(TRUE["chinchilla"], n, d), [""] * len(n), "")
    ).a == pytest.approx(exponent, abs=0.03)
    with pytest.raises(ScalingError, match="two or more amounts of compute"):
        isoflop(runs.only(runs.flops < 2e18))
    with pytest.raises(ScalingError, match="three or more sizes"):
        envelope(runs)


def equal_compute_runs(noise: float = 0.0, outlier: int | None = None) -> Runs:
    """Sizes that are the same at every budget, so that optima lie off their middle."""
    n, c = (
        a.ravel() for a in np.meshgrid(np.geomspace(1e7, 3e10, 15), np.geomspace(3e18, 3e21, 7))
    )
    loss = CHINCHILLA.loss(TRUE["chinchilla"], n, c / 6 / n)
    loss = loss * np.exp(noise * np.random.default_rng(0).standard_normal(len(n)))
    if outlier is not None:
        loss[outlier] *= 1.05
    return Runs(n, c / 6 / n, loss, [""] * len(n), "")


def test_minima_of_equal_compute_are_local_and_robust() -> None:
    """A parabola through all sizes is off by 0.005: valleys are steeper on one side."""
    exponent = 0.28 / 0.62
    frontier = isoflop(equal_compute_runs())
    assert frontier.a == pytest.approx(exponent, abs=0.002) and not frontier.notes
    for best in frontier.optima:
        true = float(optimum(CHINCHILLA, TRUE["chinchilla"], best.flops)[0])
        assert best.parameters == pytest.approx(true, rel=0.05)
        assert best.valley and best.valley.low < best.parameters < best.valley.high
    # A run that failed, far from every minimum and in the middle of the valley
    runs = equal_compute_runs()
    at = np.flatnonzero(np.isclose(runs.flops, runs.flops.min()))
    for index in (at[-1], at[np.argsort(runs.loss[at])[3]]):
        assert isoflop(equal_compute_runs(outlier=int(index))).a == pytest.approx(
            exponent, abs=0.01
        )


def test_a_budget_with_an_interior_lowest_loss_is_kept() -> None:
    """And the note on those without says where their lowest loss lies."""
    runs = equal_compute_runs()
    budgets = np.unique(runs.flops.round(-10))
    # Ripples: no parabola through more than three sizes has a minimum between them
    first = np.flatnonzero(np.isclose(runs.flops, budgets[0], rtol=0.01))
    losses = runs.loss.copy()
    losses[first] = 3 - 0.02 * np.abs(np.arange(len(first)) - 7)
    losses[first[7]] = losses[first].min() - 0.01
    frontier = isoflop(replace(runs, loss=losses))
    assert len(frontier.optima) == 7
    assert any("two neighbours" in note for note in frontier.notes)
    small = runs.only((runs.flops < 1e21) | (runs.parameters < 1e9))
    notes = " ".join(isoflop(small).notes)
    assert "lowest loss at the largest size" in notes and "add larger sizes" in notes
    assert "no minimum between" not in notes


def test_valleys_are_drawn(tmp_path: Path) -> None:
    frontier = isoflop(equal_compute_runs(noise=0.002), bootstrap=20)
    figure = Figure()
    axes = figure.subplots()
    plot_valleys(axes, frontier, figure)
    assert len(axes.lines) == len(frontier.optima) == 7
    for line, best in zip(axes.lines, frontier.optima, strict=True):
        losses = np.asarray(line.get_ydata())
        assert losses.min() == pytest.approx(best.loss, rel=1e-3)
    plot_fit(frontier, tmp_path / "isoflop.svg")
    assert (tmp_path / "isoflop.svg").stat().st_size


def test_nonnegative_least_squares() -> None:
    """Karush-Kuhn-Tucker conditions: no gain from any column, at zero or above."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        columns, target = rng.standard_normal((9, 3)), rng.standard_normal(9)
        solution, _ = nnls(columns, target)
        slope = columns.T @ (columns @ solution - target)
        assert (solution >= 0).all() and (slope > -1e-9).all() and abs(slope @ solution) < 1e-9


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (lambda r: r.only(np.arange(5)), "5 runs are too few"),
        (lambda r: r.only(np.isclose(r.parameters, 1e7)), "one model size"),
        (lambda r: r.only(np.isclose(r.tokens, 1e9)), "one number of tokens"),
    ],
)
def test_runs_that_cannot_be_fitted_are_refused(runs, message: str) -> None:
    with pytest.raises(ScalingError, match=message):
        fit(CHINCHILLA, runs(synthetic_runs(CHINCHILLA)))
    rising = synthetic_runs(CHINCHILLA)
    with pytest.raises(ScalingError, match="loss would not fall with"):
        fit(CHINCHILLA, replace(rising, loss=5.0 - rising.loss))
    with pytest.raises(ScalingError, match="--delta"):
        fit(OVER_TRAINING, synthetic_runs(OVER_TRAINING), delta=1e-3)
    assert KAPLAN.constants == tuple(TRUE["kaplan"])


@pytest.mark.thorough
def test_resamples_with_rising_loss_are_excluded_and_reported() -> None:
    """Runs that hardly determine N's share: in some resamples larger models are worse."""
    n, d = (grid.ravel() for grid in np.meshgrid([2e5, 3e5, 5e5, 8e5], [5e5, 1e6, 2e6]))
    noise = np.exp(0.03 * np.random.default_rng(3).standard_normal(len(n)))
    law_fit = fit(
        CHINCHILLA,
        Runs(
            n,
            d,
            (1.5 + 2.0 * n**-0.1 + 60 * d**-0.25) * noise,
            [str(i) for i in range(len(n))],
            "all",
        ),
        bootstrap=400,
    )
    assert (
        0 < law_fit.refused < 400
        and len(law_fit.resamples["A"]) == 400 - law_fit.refused
        and law_fit.resamples["alpha"].min() > 0
    )
    line = f"in {law_fit.refused} of 400 resamples loss does not fall"
    assert any(line in warning for warning in warnings(law_fit)) and any(
        line in warning for warning in predict(law_fit, 3e6, 3e6, 0.9)["warnings"]
    )
    low, high = predict(law_fit, 3e6, 3e6, 0.9)["interval"]
    assert low < predict(law_fit, 3e6, 3e6, 0.9)["loss"] < high < 10


DAMAGES: dict[str, tuple[list[str | int], object, str]] = {
    "size": (["runs", "parameters", 0], 0, r"runs\.parameters\.0: Input should be greater than 0"),
    "length": (["runs", "loss"], [3.0], "runs: its columns have unequal lengths"),
    "exponent": (["alpha"], 0.0, r"alpha is 0\.0, expected a number above 0"),
    "constant": (["E"], "x", "E is 'x', expected a number above 0"),
    "resamples": (["resamples"], [[1.0, 2.0]], "resamples is a list"),
    "column": (["resamples"], {"A": [1.0]}, "resamples needs columns of one length for A, B"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_no_fit_is_refused_by_its_key(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "fit.json"
    values = fit_json(fit(CHINCHILLA, synthetic_runs(CHINCHILLA), bootstrap=2))
    path.write_text(json.dumps(values))
    assert read_fit(path).runs.labels == values["runs"]["labels"]
    (*keys, last), value, message = DAMAGES[damage]
    holder = values
    for key in keys:
        holder = holder[key]  # type: ignore[index]
    holder[last] = value  # type: ignore[index]
    path.write_text(json.dumps(values))
    with pytest.raises(ScalingError, match=rf"fit\.json is not a fit \({message}"):
        read_fit(path)
