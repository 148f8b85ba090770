"""Optimum of a hyperparameter: grid of factors of 2, parabola in its logarithm, interval.

A grid of factors is extended while its lowest loss is at an edge. A parabola in x = log2(factor)
through the lowest loss and its neighbours, with an offset for every seed, then gives the optimum
between them. Its interval is Fieller's for the zero of the parabola's slope, from the residuals,
which hold both the noise of seeds and what is no parabola. There is none where the curvature is not
larger than its own uncertainty, or where it reaches beyond what was tried: then the trials do not
bound the optimum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

GRID = (-2, -1, 0, 1, 2)  # log2 of the factors that are always tried
LARGEST_EXPONENT = 6  # the grid is extended up to factors of 2^-6 and 2^6
REACH = 2  # grid points on either side of the lowest loss that the parabola is fitted to
LEVEL = 0.95  # of intervals


@dataclass(frozen=True)
class Point:
    """Trials of one value.

    Attributes:
        exponent: Integer of the grid; the factor is about 2^exponent.
        value: The hyperparameter.
        losses: Loss by seed, nats per token; infinite for a trial that diverged.
    """

    exponent: int
    value: float
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean loss over seeds; infinite if a trial diverged."""
        return sum(self.losses) / len(self.losses)

    @property
    def diverged(self) -> int:
        """Trials that diverged."""
        return sum(not math.isfinite(loss) for loss in self.losses)

    def to_json(self) -> dict[str, Any]:
        """Return the fields for JSON; an infinite loss is null."""
        losses = [loss if math.isfinite(loss) else None for loss in self.losses]
        mean = self.mean if math.isfinite(self.mean) else None
        return {"exponent": self.exponent, "value": self.value, "losses": losses, "mean": mean}


@dataclass(frozen=True)
class Parabola:
    """y = offset + slope x + curvature x^2, fitted by least squares.

    Attributes:
        offset: Mean of the offsets of the seeds.
        slope: Coefficient of x.
        curvature: Coefficient of x^2.
        covariance: Of slope and curvature [2, 2]; None without a degree of freedom.
        degrees: Degrees of freedom of the residuals.
    """

    offset: float
    slope: float
    curvature: float
    covariance: np.ndarray | None
    degrees: int

    @property
    def vertex(self) -> float:
        """Position x of the extremum; NaN without curvature."""
        return -self.slope / (2 * self.curvature) if self.curvature else math.nan

    def interval(self, level: float = LEVEL) -> tuple[float, float] | None:
        """Fieller's interval of the vertex; None where it has no bounds.

        It holds all x at which the slope b + 2 c x is within t standard errors of 0.
        """
        if self.covariance is None:
            return None
        t = float(stats.t.ppf((1 + level) / 2, self.degrees))
        b, c = self.slope, self.curvature
        (bb, bc), (_, cc) = t**2 * self.covariance
        square, linear, constant = 4 * (c**2 - cc), 4 * (b * c - bc), b**2 - bb
        if c <= 0 or square <= 0:
            return None
        root = math.sqrt(max(linear**2 - 4 * square * constant, 0.0))
        return (-linear - root) / (2 * square), (-linear + root) / (2 * square)


@dataclass(frozen=True)
class Optimum:
    """Best value of a hyperparameter, and how well the trials determine it.

    Attributes:
        value: The value.
        interval: Lowest and highest value, at `LEVEL` by "parabola" and of no level by "grid";
            None where the trials do not bound the optimum.
        method: "parabola", or "grid" for the value with the lowest loss.
        is_bracketed: Worse values were tried on both sides.
        notes: What a user must know of it, one sentence each.
        parabola: In x = log2(value / center); None where none could be fitted.
        center: Value at x = 0.
        points: All values that were tried, ascending.
    """

    value: float
    interval: tuple[float, float] | None
    method: str
    is_bracketed: bool
    notes: tuple[str, ...]
    parabola: Parabola | None
    center: float
    points: tuple[Point, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        parabola = self.parabola and {
            "offset": self.parabola.offset,
            "slope": self.parabola.slope,
            "curvature": self.parabola.curvature,
            "degrees_of_freedom": self.parabola.degrees,
        }
        return {
            "value": self.value,
            "interval": list(self.interval) if self.interval else None,
            "interval_level": LEVEL if self.interval and self.method == "parabola" else None,
            "method": self.method,
            "bracketed": self.is_bracketed,
            "notes": list(self.notes),
            "parabola": parabola,
            "center": self.center,
            "points": [point.to_json() for point in self.points],
        }


def search(measure: Callable[[int], Point]) -> list[Point]:
    """Measure the grid, and further values while the lowest loss is at an edge.

    Args:
        measure: Trains the trials of an exponent.

    Returns:
        Points in ascending order.
    """
    points = {exponent: measure(exponent) for exponent in GRID}
    while True:
        ordered = [points[exponent] for exponent in sorted(points)]
        best = best_point(ordered)
        if best in (ordered[0], ordered[-1]):
            exponent = best.exponent + (1 if best is ordered[-1] else -1)
            if abs(exponent) <= LARGEST_EXPONENT:
                points[exponent] = measure(exponent)
                continue
        return ordered


def best_point(points: Sequence[Point]) -> Point:
    """The point of lowest mean loss; the lowest value where all diverged."""
    return min(points, key=lambda point: (point.mean, point.exponent))


def locate(name: str, points: Sequence[Point], center: float) -> Optimum:
    """Find the optimum among measured points.

    Args:
        name: Of the hyperparameter, for notes.
        points: Ascending.
        center: Value at x = 0 of the parabola.
    """
    best = best_point(points)
    place = list(points).index(best)
    bracketed = 0 < place < len(points) - 1 and math.isfinite(best.mean)
    notes = _notes_on_points(name, points, best)
    near = [
        point
        for point in points
        if abs(point.exponent - best.exponent) <= REACH and math.isfinite(point.mean)
    ]
    parabola = fit_parabola(near, center) if len(near) >= 3 else None
    value, interval, method = best.value, None, "grid"
    if bracketed:
        neighbours = (points[place - 1].value, points[place + 1].value)
        if parabola is not None and _is_inside(parabola, neighbours, center):
            value, method = center * 2**parabola.vertex, "parabola"
            interval = _bounded(parabola, points, center)
            if interval is None:
                notes.append(_undetermined(name, parabola))
            elif len(best.losses) == 1:
                notes.append(
                    f"one seed: the interval of {name} is from the residuals of the parabola alone"
                )
        else:
            interval = neighbours
            notes.append(
                f"no parabola has its minimum between {name}s {neighbours[0]:g} and"
                f" {neighbours[1]:g}: the best is that of the grid, and its interval, that of the"
                " neighbours, has no level"
            )
    return Optimum(value, interval, method, bracketed, tuple(notes), parabola, center, (*points,))


def _notes_on_points(name: str, points: Sequence[Point], best: Point) -> list[str]:
    """What must be known of the points: trials that diverged, a best one at the edge."""
    if not math.isfinite(best.mean):
        return [f"every {name} that was tried diverged"]
    notes = []
    if diverged := [point for point in points if point.diverged]:
        values = ", ".join(f"{point.value:g}" for point in diverged)
        notes.append(f"{name} {values} diverged, which counts as worse than all others")
    if best in (points[0], points[-1]):
        side = "lower" if best is points[0] else "higher"
        notes.append(
            f"the lowest loss is at the edge of the {name}s that were tried, {best.value:g}: the"
            f" best may be {side}"
        )
    return notes


def _bounded(
    parabola: Parabola, points: Sequence[Point], center: float
) -> tuple[float, float] | None:
    """Interval of the value; None where it has no bounds within what was tried."""
    tried = [math.log2(points[place].value / center) for place in (0, -1)]
    bounds = parabola.interval()
    if bounds is None or bounds[0] < tried[0] or bounds[1] > tried[1]:
        return None
    return center * 2 ** bounds[0], center * 2 ** bounds[1]


def fit_parabola(points: Sequence[Point], center: float) -> Parabola:
    """Fit a parabola in x = log2(value / center) with an offset for every seed.

    Args:
        points: Three or more, with finite losses.
        center: Value at x = 0.
    """
    seeds = len(points[0].losses)
    x = np.repeat([math.log2(point.value / center) for point in points], seeds)
    y = np.array([point.losses for point in points]).ravel()
    design = np.column_stack([np.tile(np.eye(seeds), (len(points), 1)), x, x**2])
    coefficients = np.linalg.lstsq(design, y, rcond=None)[0]
    degrees = len(y) - seeds - 2
    covariance = None
    if degrees:
        variance = float(((y - design @ coefficients) ** 2).sum()) / degrees
        covariance = variance * np.linalg.inv(design.T @ design)[-2:, -2:]
    offset = float(coefficients[:seeds].mean())
    return Parabola(offset, float(coefficients[-2]), float(coefficients[-1]), covariance, degrees)


def _is_inside(parabola: Parabola, neighbours: tuple[float, float], center: float) -> bool:
    low, high = (math.log2(value / center) for value in neighbours)
    return parabola.curvature > 0 and low <= parabola.vertex <= high


def _undetermined(name: str, parabola: Parabola) -> str:
    if parabola.covariance is None:
        return (
            f"the parabola of {name} passes through all its points: it has no interval; use"
            " more --seeds"
        )
    return (
        "noise between trials, or a curve that is no parabola, exceeds the differences between"
        f" {name}s: the {100 * LEVEL:g} % interval is wider than what was tried; use more --seeds"
        " or --steps"
    )
