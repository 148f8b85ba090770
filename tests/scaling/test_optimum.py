"""Optimum of a hyperparameter: extension of the grid, parabola, coverage of the interval, words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest

from nextpt.scaling.optimum import GRID, Optimum, Point, fit_parabola, locate, search

CENTER = 0.003


def measure(loss: Callable[[float], float], seeds: int = 1) -> Callable[[int], Point]:
    """Points of a loss by x = log2(value / center), seeds 0.1 apart."""

    def point(exponent: int) -> Point:
        losses = tuple(loss(exponent) + 0.1 * seed for seed in range(seeds))
        return Point(exponent, CENTER * 2.0**exponent, losses)

    return point


def tune(loss: Callable[[float], float], seeds: int = 1) -> Optimum:
    return locate("learning rate", search(measure(loss, seeds)), CENTER)


def noisy(minimum: float, curvature: float, noise: float, seeds: int, draw: int) -> Optimum:
    rng = np.random.default_rng(draw)
    points = []
    for exponent in GRID:
        losses = 3 + curvature * (exponent - minimum) ** 2 + 0.2 * np.arange(seeds)
        losses += noise * rng.standard_normal(seeds)
        points.append(Point(exponent, CENTER * 2.0**exponent, (*losses.tolist(),)))
    return locate("learning rate", points, CENTER)


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_minimum_of_a_parabola_is_exact(seeds: int) -> None:
    optimum = tune(lambda x: 3 + 0.05 * (x - 0.4) ** 2, seeds)
    assert optimum.method == "parabola" and optimum.is_bracketed
    assert optimum.value == pytest.approx(CENTER * 2**0.4)
    assert optimum.interval == pytest.approx((optimum.value, optimum.value), rel=1e-4)
    assert [point.exponent for point in optimum.points] == list(GRID)


def test_the_interval_covers_the_minimum_as_often_as_it_says() -> None:
    optima = [noisy(0.3, 0.05, 0.01, 2, draw) for draw in range(600)]
    truth = CENTER * 2**0.3
    intervals = [o.interval for o in optima if o.method == "parabola" and o.interval]
    assert len(intervals) > 590
    assert all(CENTER / 4 <= low < high <= CENTER * 4 for low, high in intervals)
    covered = np.mean([low <= truth <= high for low, high in intervals])
    # Three standard errors of a share of 0.95 over 600 draws are 0.027
    assert 0.923 < covered < 0.977


def test_more_seeds_narrow_the_interval() -> None:
    def width(seeds: int) -> float:
        intervals = [noisy(0.3, 0.05, 0.01, seeds, draw).interval for draw in range(50)]
        return float(np.median([math.log2(high / low) for low, high in filter(None, intervals)]))

    assert width(4) < 0.6 * width(1)


def test_noise_above_the_differences_gives_no_interval_and_says_so() -> None:
    optima = [noisy(0.0, 0.0005, 0.05, 2, draw) for draw in range(40)]
    parabolas = [o for o in optima if o.method == "parabola"]
    assert parabolas
    silent = [o for o in parabolas if o.interval is not None]
    assert len(silent) <= 0.1 * len(optima)
    for optimum in parabolas:
        if optimum.interval is None:
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
    assert not optimum.is_bracketed and optimum.interval is None and optimum.method == "grid"
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
    losses = {-2: 3.0, -1: 2.0, 0: 1.0, 1: 1.01, 2: 9.0}
    optimum = tune(lambda x: losses[int(x)])
    assert optimum.value == pytest.approx(CENTER * 2**optimum.parabola.vertex)
    losses = {-2: 1.5, -1: 1.5, 0: 1.0, 1: 1.001, 2: 1.002}
    optimum = tune(lambda x: losses[int(x)])
    assert optimum.method == "grid" and optimum.value == CENTER
    assert optimum.interval == (CENTER / 2, CENTER * 2)
    assert "no parabola has its minimum between" in optimum.notes[0]


def test_three_points_have_no_interval() -> None:
    points = [Point(x, CENTER * 2.0**x, (3.0 + x * x,)) for x in (-1, 0, 1)]
    assert fit_parabola(points, CENTER).interval() is None
    optimum = locate("learning rate", points, CENTER)
    assert optimum.interval is None and "use more --seeds" in optimum.notes[0]
