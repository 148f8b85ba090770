"""Compute-optimal frontier by approaches 1 and 2 of Hoffmann et al. (Chinchilla).

Source: arXiv 2203.15556, section 3. Both find the best size at several amounts of compute, and fit
N = k C^a to them. Approach 1
takes, at each compute, the lowest of all training curves; approach 2 the minimum of a parabola of
the loss over ln N through runs of equal compute. A valley is no parabola far from its minimum: only
the sizes next to the lowest loss count, by the Huber loss, so that no single run decides. A
training curve is biased where its learning rate has not decayed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nextpt.base.errors import ScalingError
from nextpt.scaling.fitting import DELTA, SEED
from nextpt.scaling.observations import FLOPS_PER_PARAMETER_AND_TOKEN, Runs, clusters
from nextpt.scaling.solver import minimise

EQUAL_COMPUTE = 0.06  # relative gap in compute below which runs are of one isoFLOP group
PARABOLA = 3  # sizes that a parabola takes at least
SIDE = 3  # sizes on either side of the lowest loss that a parabola is fitted to
POINTS = 1500  # amounts of compute at which training curves are compared, as in the paper


@dataclass(frozen=True)
class Valley:
    """Parabola of the loss over the sizes of one amount of compute.

    Attributes:
        curvature: Of ln L over ln N, at the minimum.
        low: Smallest N that it was fitted to.
        high: Largest.
    """

    curvature: float
    low: float
    high: float


@dataclass(frozen=True)
class Optimum:
    """The best size at one amount of compute; loss in nats per token.

    Attributes:
        flops: C.
        parameters: N.
        tokens: D.
        loss: L.
        valley: Of approach 2; None for approach 1.
    """

    flops: float
    parameters: float
    tokens: float
    loss: float
    valley: Valley | None = None


@dataclass(frozen=True)
class Frontier:
    """N = k C^a and D = C / (6 N), so the exponent of D is 1 - a.

    Attributes:
        name: Value of --form.
        runs: The runs.
        optima: The optima that the line was fitted to.
        a: Exponent of N.
        log_k: ln k.
        resamples: a and ln k of the bootstrap, [R, 2]; may be empty.
        notes: Warnings.
    """

    name: str
    runs: Runs
    optima: list[Optimum]
    a: float
    log_k: float
    resamples: np.ndarray
    notes: list[str]

    def parameters(self, flops: float) -> float:
        """Return the optimal N for `flops`."""
        return float(np.exp(self.log_k + self.a * np.log(flops)))

    def parameter_resamples(self, flops: float) -> np.ndarray:
        """Return the optimal N for `flops` of every resample, [R]."""
        return np.asarray(np.exp(self.resamples[:, 1] + self.resamples[:, 0] * np.log(flops)))


def isoflop(runs: Runs, bootstrap: int = 0) -> Frontier:
    """Fit the frontier by approach 2; the bootstrap resamples the runs of every group.

    Raises:
        ScalingError: Fewer than two groups of equal compute have a minimum.
    """
    groups = [runs.only(group) for group in clusters(runs.flops, EQUAL_COMPUTE)]
    usable = [group for group in groups if len(group.sizes()) >= PARABOLA]
    optima, notes = [], []
    for group in usable:
        best, note = _optimum(group)
        optima += [best] if best else []
        notes += [note] if note else []
    if len(optima) < 2:
        raise ScalingError(
            f"approach 2 needs two or more amounts of compute with {PARABOLA} or more sizes each"
            f" and a minimum between them; of {len(runs)} runs in {len(groups)} groups of equal"
            f" compute (within {EQUAL_COMPUTE:.0%}) {len(optima)} are such"
        )
    generator = np.random.RandomState(SEED)
    vertices = [
        _Valleys(
            group,
            generator.multinomial(len(group), np.full(len(group), 1 / len(group)), bootstrap),
        ).vertices[:, 0]
        for group in usable
        if bootstrap
    ]
    flops = np.log([group.flops.mean() for group in usable])
    lines = [
        np.polyfit(flops[kept], sizes[kept], 1)
        for sizes in np.array(vertices).T
        if (kept := np.isfinite(sizes)).sum() > 1
    ]
    return _frontier("isoflop", runs, optima, lines, bootstrap, notes)


def envelope(curves: Runs, bootstrap: int = 0) -> Frontier:
    """Fit the frontier by approach 1; the bootstrap resamples curves.

    Args:
        curves: Points of training curves; those of one size are one curve.
        bootstrap: Number of resamples.

    Raises:
        ScalingError: Fewer than three sizes have two points or more.
    """
    lines = [
        _curve(curves, size) for size in curves.sizes() if len(np.unique(curves.tokens[size])) > 1
    ]
    if len(lines) < 3:
        raise ScalingError(
            "approach 1 needs training curves (two or more points each) of three or more sizes;"
            f" there are {len(lines)}"
        )
    optima = _lowest(lines)
    if len({o.parameters for o in optima}) < 2:
        raise ScalingError(
            "one size has the lowest loss at every amount of compute: there is no frontier between"
            " sizes; add larger or smaller ones"
        )

    generator = np.random.RandomState(SEED)
    resamples = []
    for _ in range(bootstrap):
        drawn = _lowest([lines[i] for i in generator.choice(len(lines), len(lines))])
        if len({o.flops for o in drawn}) > 1 and len({o.parameters for o in drawn}) > 1:
            resamples.append(np.array(_line(drawn)))
    return _frontier("envelope", curves, optima, resamples, bootstrap, [])


class _Valleys:
    """Minima of ln L over ln N of the runs of one amount of compute, for each of R resamples.

    The parabola takes the sizes next to that of the lowest loss, SIDE on either side; where it has
    no minimum between them, that size and its two neighbours, between which there always is one.

    Args:
        group: The runs, of three or more sizes.
        weights: How often each run was drawn, [R, n].

    Attributes:
        vertices: ln N of the minimum and ln L there, NaN without, [R, 2].
        curvatures: Of ln L over ln N, [R].
        ends: ln N of the smallest and the largest size of the parabola, [R, 2].
        lowest: Index of the size with the lowest loss, [R].
        is_inside: Smaller and larger sizes were drawn too, [R].
        is_narrow: The parabola is that of three sizes, [R].
    """

    def __init__(self, group: Runs, weights: np.ndarray) -> None:
        self.x, self.y = np.log(group.parameters), np.log(group.loss)
        self.of_size = np.zeros((len(group), len(group.sizes())))
        for index, size in enumerate(group.sizes()):
            self.of_size[size, index] = 1
        drawn = weights @ self.of_size
        with np.errstate(invalid="ignore", divide="ignore"):
            means = np.where(drawn > 0, (weights * self.y) @ self.of_size / drawn, np.inf)
        self.lowest = means.argmin(1)
        rank = np.cumsum(drawn > 0, axis=1)
        at_lowest = np.take_along_axis(rank, self.lowest[:, None], 1)
        self.is_inside = (at_lowest[:, 0] > 1) & (at_lowest[:, 0] < rank[:, -1])
        self.vertices = np.full((len(weights), 2), np.nan)
        self.curvatures = np.full(len(weights), np.nan)
        self.ends = np.full((len(weights), 2), np.nan)
        self.is_narrow = np.zeros(len(weights), dtype=bool)
        for side, delta in ((SIDE, DELTA), (1, np.inf)):
            rest = np.flatnonzero(self.is_inside & np.isnan(self.vertices[:, 0]))
            if len(rest):
                near = (np.abs(rank - at_lowest) <= side) & (drawn > 0)
                self._fit(rest, weights[rest] * (near[rest] @ self.of_size.T), delta)
                self.is_narrow[rest] = side == 1

    def _fit(self, rows: np.ndarray, weights: np.ndarray, delta: float) -> None:
        """Fit the parabolas of some resamples, [rows] with weights [rows, n], and keep minima."""
        middle = self.x.mean()
        z = self.x - middle
        design = np.stack([np.ones_like(z), z, z**2], axis=-1)
        low = np.where(weights > 0, self.x, np.inf).min(1)
        high = np.where(weights > 0, self.x, -np.inf).max(1)
        c0, c1, c2 = _robust_least_squares(design, self.y, weights, delta).T
        with np.errstate(invalid="ignore", divide="ignore"):
            vertex = middle - c1 / (2 * c2)
            value = c0 - c1**2 / (4 * c2)
        kept = (c2 > 0) & (low < vertex) & (vertex < high)
        chosen = rows[kept]
        self.vertices[chosen] = np.stack([vertex, value], axis=1)[kept]
        self.curvatures[chosen] = 2 * c2[kept]
        self.ends[chosen] = np.stack([low, high], axis=1)[kept]


def _robust_least_squares(
    design: np.ndarray, target: np.ndarray, weights: np.ndarray, delta: float
) -> np.ndarray:
    """Return theta [R, p] of the least sum of w huber(design @ theta - target).

    Args:
        design: [n, p].
        target: [n].
        weights: [R, n].
        delta: Of the Huber loss.
    """
    roots = np.sqrt(weights)[..., None]
    start = (np.linalg.pinv(design * roots) @ (roots * target[:, None]))[..., 0]
    if np.isinf(delta):
        return np.asarray(start)

    def predict(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return theta @ design.T, np.repeat(design[None], len(theta), axis=0)

    return minimise(predict, target, weights, start, delta)[0]


def _optimum(group: Runs) -> tuple[Optimum | None, str | None]:
    """Return the best size of one amount of compute, and what a user must know of it."""
    valleys = _Valleys(group, np.ones((1, len(group))))
    about = f"the runs of about {group.flops.mean():.2e} FLOPs"
    size = group.only(group.sizes()[valleys.lowest[0]]).parameters.mean()
    if not valleys.is_inside[0]:
        side = "smallest" if valleys.lowest[0] == 0 else "largest"
        return None, (
            f"{about} have their lowest loss at the {side} size, N = {size:.3g}: the minimum may"
            f" lie beyond; they are left out, add {side.replace('est', 'er')} sizes"
        )
    vertex, value = valleys.vertices[0]
    if np.isnan(vertex):
        return None, f"{about} have one loss at all sizes about N = {size:.3g}; they are left out"
    flops = float(np.exp(np.log(group.flops).mean()))
    parameters = float(np.exp(vertex))
    low, high = (float(end) for end in np.exp(valleys.ends[0]))
    note = None
    if valleys.is_narrow[0] and len(group.sizes()) > PARABOLA:
        note = (
            f"{about} are no valley about their lowest loss: their minimum is that of the parabola"
            f" through the size of the lowest loss, N = {size:.3g}, and its two neighbours"
        )
    best = Optimum(
        flops,
        parameters,
        flops / FLOPS_PER_PARAMETER_AND_TOKEN / parameters,
        float(np.exp(value)),
        Valley(float(valleys.curvatures[0]), low, high),
    )
    return best, note


def _curve(curves: Runs, size: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Return N of a size, and ln C and ln L of its points in order of C."""
    order = size[np.argsort(curves.tokens[size], kind="stable")]
    return (
        float(curves.parameters[size].mean()),
        np.log(curves.flops[order]),
        np.log(curves.loss[order]),
    )


def _lowest(lines: list[tuple[float, np.ndarray, np.ndarray]]) -> list[Optimum]:
    """Return the size of the lowest curve at each compute.

    Only where smaller and larger sizes have a loss at that compute too.
    """
    grid = np.linspace(
        min(line[1][0] for line in lines), max(line[1][-1] for line in lines), POINTS
    )
    losses = np.stack([np.interp(grid, c, loss, left=np.nan, right=np.nan) for _, c, loss in lines])
    sizes = np.array([line[0] for line in lines])
    optima = []
    for log_flops, column in zip(grid, losses.T, strict=True):
        trained = np.isfinite(column)
        if trained.sum() < 2:
            continue
        best = int(np.nanargmin(column))
        # The smallest or the largest that has a curve here may be lowest only because the better
        # size was not trained this far.
        if sizes[best] in (sizes[trained].min(), sizes[trained].max()):
            continue
        flops = float(np.exp(log_flops))
        optima.append(
            Optimum(
                flops,
                float(sizes[best]),
                flops / FLOPS_PER_PARAMETER_AND_TOKEN / float(sizes[best]),
                float(np.exp(column[best])),
            )
        )
    return optima


def _line(optima: list[Optimum]) -> tuple[float, float]:
    a, log_k = np.polyfit(
        np.log([o.flops for o in optima]), np.log([o.parameters for o in optima]), 1
    )
    return float(a), float(log_k)


def _frontier(
    name: str,
    runs: Runs,
    optima: list[Optimum],
    lines: list[np.ndarray],
    bootstrap: int,
    notes: list[str],
) -> Frontier:
    if len(lines) < 0.9 * bootstrap:
        notes = [
            *notes,
            (
                f"{bootstrap - len(lines)} of {bootstrap} resamples show no frontier; the interval"
                " is of the others, and too narrow"
            ),
        ]
    return Frontier(name, runs, optima, *_line(optima), np.array(lines).reshape(-1, 2), notes)
