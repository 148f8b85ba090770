"""Optimum of a hyperparameter: extension of the grid, fit, coverage of the interval, words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest

from nextpt.scaling.optimum import GRID, LEVEL, Optimum, Point, fit_curve, locate, search

CENTER = 0.003


def measure(loss: Callable[[float], float], seeds: int = 1) -> Callable[[int], Point]:
    """Points of a loss by x = log2(value / center), seeds 0.1 apart."""

    def point(exponent: int) -> Point:
        losses = tuple(loss(exponent) + 0.1 * seed for seed in range(seeds))
        return Point(exponent, CENTER * 2.0**exponent, losses)

    return point


def tune(loss: Callable[[float], float], seeds: int = 1) -> Optimum:
    return locate("learning rate", search(measure(loss, seeds)), CENTER)


def noisy(
    minimum: float, curvature: float, noise: float, seeds: int, draw: int, cubic: float = 0.0
) -> Optimum:
    rng = np.random.default_rng(draw)
    points = []
    for exponent in GRID:
        x = exponent - minimum
        losses = 3 + curvature * x**2 + cubic * x**3 + 0.2 * np.arange(seeds)
        losses += noise * rng.standard_normal(seeds)
        points.append(Point(exponent, CENTER * 2.0**exponent, (*losses.tolist(),)))
    return locate("learning rate", points, CENTER)


@pytest.mark.parametrize("cubic", [0.0, 0.008, -0.008])
def test_the_minimum_of_a_cubic_is_exact(cubic: float) -> None:
    optimum = tune(lambda x: 3 + 0.05 * (x - 0.4) ** 2 + cubic * (x - 0.4) ** 3, seeds=3)
    assert optimum.curve is not None and optimum.is_bracketed and optimum.level == LEVEL
    assert optimum.value == pytest.approx(CENTER * 2**0.4)
    assert optimum.interval == pytest.approx((optimum.value, optimum.value), rel=2e-3)
    assert [point.exponent for point in optimum.points] == list(GRID)


@pytest.mark.parametrize("cubic", [0.0, 0.008])
def test_the_interval_covers_the_minimum_as_often_as_it_says(cubic: float) -> None:
    optima = [noisy(0.3, 0.05, 0.01, 2, draw, cubic) for draw in range(600)]
    truth = CENTER * 2**0.3
    intervals = [o.interval for o in optima if o.level and o.interval]
    assert len(intervals) > 590
    assert all(CENTER / 4 <= low < high <= CENTER * 4 for low, high in intervals)
    covered = np.mean([low <= truth <= high for low, high in intervals])
    # Three standard errors of a share of 0.95 over 600 draws are 0.027
    assert 0.923 < covered < 0.977


def test_one_seed_has_an_interval_without_a_level() -> None:
    optimum = tune(lambda x: 3 + 0.05 * (x - 0.4) ** 2)
    assert optimum.value == pytest.approx(CENTER * 2**0.4)
    assert optimum.interval == (CENTER / 2, CENTER * 2) and optimum.level is None
    assert "one seed does not tell the noise" in optimum.notes[0]


def test_more_seeds_narrow_the_interval() -> None:
    def width(seeds: int) -> float:
        intervals = [noisy(0.3, 0.05, 0.01, seeds, draw).interval for draw in range(50)]
        return float(np.median([math.log2(high / low) for low, high in filter(None, intervals)]))

    assert width(6) < 0.7 * width(2)


def test_noise_above_the_differences_gives_no_interval_and_says_so() -> None:
    optima = [noisy(0.0, 0.0005, 0.05, 2, draw) for draw in range(40)]
    assert sum(o.level is not None for o in optima) <= 0.1 * len(optima)
    undetermined = [o for o in optima if o.is_bracketed and o.interval is None]
    assert undetermined
    for optimum in undetermined:
        assert any("exceeds the differences between" in note for note in optimum.notes)


@pytest.mark.parametrize(("minimum", "exponents"), [(4.2, range(-2, 6)), (-3.1, range(-4, 3))])
def test_the_grid_is_extended_while_the_best_is_at_its_edge(
    minimum: float, exponents: range
) -> None:
    optimum = tune(lambda x: 3 + 0.05 * (x - minimum) ** 2)
    assert [point.exponent for point in optimum.points] == list(exponents)
    assert optimum.is_bracketed and optimum.value == pytest.approx(CENTER * 2**minimum)


@pytest.mark.parametrize(("direction", "side"), [(1, "higher"), (-1, "lower")])
def test_an_edge_that_stays_the_best_is_bounded_and_named(direction: int, side: str) -> None:
    optimum = tune(lambda x: 3 - 0.1 * direction * x)
    exponents = [point.exponent for point in optimum.points]
    assert len(exponents) == 9 and max(map(abs, exponents)) == 6
    assert not optimum.is_bracketed and optimum.interval is None and optimum.curve is None
    assert optimum.value == CENTER * 2.0 ** (6 * direction)
    assert f"the best may be {side}" in optimum.notes[0]


def test_trials_that_diverged_are_worse_than_all_others() -> None:
    optimum = tune(lambda x: math.inf if x > 1 else 3 + 0.05 * (x - 1) ** 2)
    assert optimum.is_bracketed and optimum.value == pytest.approx(CENTER * 2)
    assert optimum.notes[0] == "learning rate 0.012 diverged, which counts as worse than all others"
    assert json.loads(json.dumps(optimum.to_json(), allow_nan=False))["points"][-1]["mean"] is None


def test_the_grid_goes_down_while_everything_diverges() -> None:
    optimum = tune(lambda x: math.inf if x > -4 else 3 + (x + 5) ** 2)
    assert [point.exponent for point in optimum.points] == list(range(-6, 3))
    assert optimum.value == pytest.approx(CENTER * 2**-5)
    hopeless = tune(lambda x: math.inf)
    assert hopeless.points[0].exponent == -6 and not hopeless.is_bracketed
    assert "every learning rate that was tried diverged" in hopeless.notes


def test_without_a_minimum_between_the_neighbours_the_grid_decides() -> None:
    losses = {-2: 1.5, -1: 1.5, 0: 1.0, 1: 1.4, 2: 0.999}
    points = [Point(x, CENTER * 2.0**x, (loss,)) for x, loss in losses.items()]
    edge = locate("learning rate", points, CENTER)
    assert edge.curve is None and not edge.is_bracketed and edge.value == CENTER * 4
    losses = {-2: 1.001, -1: 1.0005, 0: 1.0, 1: 9.0, 2: 1.01}
    points = [Point(x, CENTER * 2.0**x, (loss,)) for x, loss in losses.items()]
    optimum = locate("learning rate", points, CENTER)
    assert optimum.curve is None and optimum.value == CENTER and optimum.level is None
    assert optimum.interval == (CENTER / 2, CENTER * 2)
    assert "no curve has its minimum between" in optimum.notes[0]


def test_points_beside_trials_that_diverged_are_enough() -> None:
    points = [
        Point(x, CENTER * 2.0**x, (3.0 + x * x, 3.1 + x * x) if x < 2 else (math.inf, 3.0))
        for x in (-1, 0, 1, 2)
    ]
    optimum = locate("learning rate", points, CENTER)
    assert optimum.value == pytest.approx(CENTER) and optimum.level == LEVEL
    assert fit_curve(points[:3], CENTER).degrees == 2
