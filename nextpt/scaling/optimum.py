"""Optimum of a hyperparameter: grid of factors of 2, polynomial in its logarithm, interval.

A grid of factors is extended while its lowest loss is at an edge. A polynomial of degree 3 in
x = log2(factor), fitted to the lowest loss and its neighbours with an offset for every seed, then
gives the optimum between them: losses rise faster on one side, which a parabola cannot follow. Its
interval has all x at which the slope is within t standard errors of 0, Fieller's theorem for a
polynomial, with the residuals of several seeds. There is none where it reaches beyond what was
fitted: then the trials do not bound the optimum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from scipy.optimize import brentq

GRID = (-2, -1, 0, 1, 2)  # log2 of the factors that are always tried
LARGEST_EXPONENT = 6  # the grid is extended up to factors of 2^-6 and 2^6
REACH = 2  # grid points on either side of the lowest loss that the polynomial is fitted to
DEGREE = 3  # of the polynomial, where there are points enough
LEVEL = 0.95  # of intervals
RESOLUTION = 4001  # positions at which the slope is computed


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
class Curve:
    """y = offset + c_1 x + c_2 x^2 + ..., fitted by least squares.

    Attributes:
        offset: Mean of the offsets of the seeds.
        coefficients: c_1, c_2, ... [degree].
        covariance: Of the coefficients [degree, degree]; None with one seed, whose residuals do not
            tell noise from what is no polynomial.
        degrees: Degrees of freedom of the residuals.
        ends: Smallest and largest x that were fitted.
    """

    offset: float
    coefficients: np.ndarray
    covariance: np.ndarray | None
    degrees: int
    ends: tuple[float, float]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Values at x, any shape."""
        return np.polynomial.Polynomial([self.offset, *self.coefficients])(x)

    def minimum(self, low: float, high: float) -> float | None:
        """Position of the minimum between two positions; None where there is none."""
        slope = np.polynomial.Polynomial([self.offset, *self.coefficients]).deriv()
        # Not the roots of the slope: they lose digits where its leading coefficient is nearly 0
        x = np.linspace(low, high, RESOLUTION)
        is_negative = slope(x) < 0
        rising = np.flatnonzero(is_negative[:-1] & ~is_negative[1:])
        return float(brentq(slope, x[rising[0]], x[rising[0] + 1])) if len(rising) else None

    def interval(self, minimum: float, level: float = LEVEL) -> tuple[float, float] | None:
        """All x about the minimum at which a slope of 0 is not rejected; None without bounds."""
        if self.covariance is None:
            return None
        t = float(stats.t.ppf((1 + level) / 2, self.degrees))
        x = np.linspace(*self.ends, RESOLUTION)
        powers = np.arange(1, len(self.coefficients) + 1)
        gradient = powers * x[:, None] ** (powers - 1)
        variance = np.einsum("ij,jk,ik->i", gradient, self.covariance, gradient)
        rejected = x[np.abs(gradient @ self.coefficients) > t * np.sqrt(np.maximum(variance, 0))]
        below, above = rejected[rejected < minimum], rejected[rejected > minimum]
        return (float(below[-1]), float(above[0])) if len(below) and len(above) else None


@dataclass(frozen=True)
class Optimum:
    """Best value of a hyperparameter, and how well the trials determine it.

    Attributes:
        value: The value: the minimum of the curve, or the one with the lowest loss where the curve
            has none between its neighbours.
        interval: Lowest and highest value; None where the trials do not bound the optimum.
        level: Of the interval; None for the neighbours on the grid, whose interval has none.
        is_bracketed: Worse values were tried on both sides.
        notes: What a user must know of it, one sentence each.
        curve: In x = log2(value / center); None where its minimum is not the value.
        center: Value at x = 0.
        points: All values that were tried, ascending.
    """

    value: float
    interval: tuple[float, float] | None
    level: float | None
    is_bracketed: bool
    notes: tuple[str, ...]
    curve: Curve | None
    center: float
    points: tuple[Point, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        curve = self.curve and {
            "offset": self.curve.offset,
            "coefficients": self.curve.coefficients.tolist(),
            "degrees_of_freedom": self.curve.degrees,
        }
        return {
            "value": self.value,
            "interval": list(self.interval) if self.interval else None,
            "level": self.level,
            "bracketed": self.is_bracketed,
            "notes": list(self.notes),
            "curve": curve,
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
        center: Value at x = 0 of the curve.
    """
    best = best_point(points)
    place = list(points).index(best)
    notes = _notes_on_points(name, points, best)
    if not 0 < place < len(points) - 1 or not math.isfinite(best.mean):
        return Optimum(best.value, None, None, False, tuple(notes), None, center, (*points,))
    neighbours = (points[place - 1].value, points[place + 1].value)
    near = [
        point
        for point in points
        if abs(point.exponent - best.exponent) <= REACH and math.isfinite(point.mean)
    ]
    curve = fit_curve(near, center) if len(near) >= 3 else None
    minimum = None
    if curve is not None:
        minimum = curve.minimum(*(math.log2(value / center) for value in neighbours))
    if curve is None or minimum is None:
        notes.append(
            f"no curve has its minimum between {name}s {neighbours[0]:g} and {neighbours[1]:g}: the"
            " best is that of the grid, and its interval, that of the neighbours, has no level"
        )
        return Optimum(best.value, neighbours, None, True, tuple(notes), None, center, (*points,))
    interval: tuple[float, float] | None = neighbours
    level = None
    if curve.covariance is None:
        notes.append(
            f"one seed does not tell the noise: the interval of {name} is that of the neighbours"
            " and has no level; use more --seeds"
        )
    elif bounds := curve.interval(minimum):
        interval, level = (center * 2 ** bounds[0], center * 2 ** bounds[1]), LEVEL
    else:
        interval = None
        notes.append(
            f"noise between trials exceeds the differences between {name}s: the {100 * LEVEL:g} %"
            " interval is wider than what was tried; use more --seeds or --steps"
        )
    value = center * 2**minimum
    return Optimum(value, interval, level, True, tuple(notes), curve, center, (*points,))


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


def fit_curve(points: Sequence[Point], center: float) -> Curve:
    """Fit a polynomial in x = log2(value / center) with an offset for every seed.

    Args:
        points: Three or more, with finite losses.
        center: Value at x = 0.
    """
    seeds, degree = len(points[0].losses), min(DEGREE, len(points) - 1)
    positions = [math.log2(point.value / center) for point in points]
    x = np.repeat(positions, seeds)
    y = np.array([point.losses for point in points]).ravel()
    powers = x[:, None] ** np.arange(1, degree + 1)
    design = np.column_stack([np.tile(np.eye(seeds), (len(points), 1)), powers])
    coefficients = np.linalg.lstsq(design, y, rcond=None)[0]
    degrees = len(y) - seeds - degree
    covariance = None
    if seeds > 1:
        variance = float(((y - design @ coefficients) ** 2).sum()) / degrees
        covariance = variance * np.linalg.inv(design.T @ design)[seeds:, seeds:]
    offset = float(coefficients[:seeds].mean())
    return Curve(offset, coefficients[seeds:], covariance, degrees, (min(x), max(x)))
