"""Compute-optimal frontier by approaches 1 and 2 of Hoffmann et al. (Chinchilla).

Source: arXiv 2203.15556, section 3. Both find the best size at several amounts of compute, and fit
N = k C^a to them. Approach 1
takes, at each compute, the lowest of all training curves; approach 2 the minimum of a parabola of
the loss over ln N through runs of equal compute. A parabola is biased where the sizes do not lie
evenly about the optimum, and a training curve where its learning rate has not decayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nextpt.base.errors import ScalingError
from nextpt.scaling.fitting import SEED
from nextpt.scaling.observations import FLOPS_PER_PARAMETER_AND_TOKEN, Runs, clusters

EQUAL_COMPUTE = 0.06  # relative gap in compute below which runs are of one isoFLOP group
PARABOLA = 3  # sizes that a parabola takes at least
POINTS = 1500  # amounts of compute at which training curves are compared, as in the paper


@dataclass(frozen=True)
class Optimum:
    """The best size at one amount of compute; loss in nats per token."""

    flops: float
    parameters: float
    tokens: float
    loss: float


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
        if (best := _vertex(group)) is None:
            notes.append(
                f"the runs of about {group.flops.mean():.2e} FLOPs show no minimum between their"
                " sizes; they are left out"
            )
        else:
            optima.append(best)
    if len(optima) < 2:
        raise ScalingError(
            f"approach 2 needs two or more amounts of compute with {PARABOLA} or more sizes each"
            f" and a minimum between them; of {len(runs)} runs in {len(groups)} groups of equal"
            f" compute (within {EQUAL_COMPUTE:.0%}) {len(optima)} are such"
        )

    def draw(generator: np.random.RandomState) -> list[Optimum]:
        samples = [group.only(generator.choice(len(group), len(group))) for group in usable]
        return [vertex for sample in samples if (vertex := _vertex(sample))]

    return _frontier("isoflop", runs, optima, draw, bootstrap, notes)


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

    def draw(generator: np.random.RandomState) -> list[Optimum]:
        return _lowest([lines[i] for i in generator.choice(len(lines), len(lines))])

    return _frontier("envelope", curves, optima, draw, bootstrap, [])


def _vertex(group: Runs) -> Optimum | None:
    """Return the minimum of the parabola of ln L over ln N; None without one between the sizes."""
    x = np.log(group.parameters)
    if len(group.sizes()) < PARABOLA:
        return None
    middle = x.mean()
    c2, c1, c0 = np.polyfit(x - middle, np.log(group.loss), 2)
    if c2 <= 0 or not x.min() < (at := middle - c1 / (2 * c2)) < x.max():
        return None
    flops = float(np.exp(np.log(group.flops).mean()))
    return Optimum(
        flops,
        float(np.exp(at)),
        flops / FLOPS_PER_PARAMETER_AND_TOKEN / float(np.exp(at)),
        float(np.exp(c0 - c1**2 / (4 * c2))),
    )


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
    draw: Callable[[np.random.RandomState], list[Optimum]],
    bootstrap: int,
    notes: list[str],
) -> Frontier:
    generator, lines = np.random.RandomState(SEED), []
    for _ in range(bootstrap):
        drawn = draw(generator)
        if len({o.flops for o in drawn}) > 1 and len({o.parameters for o in drawn}) > 1:
            lines.append(_line(drawn))
    if len(lines) < 0.9 * bootstrap:
        notes = [
            *notes,
            (
                f"{bootstrap - len(lines)} of {bootstrap} resamples show no frontier; the interval"
                " is of the others, and too narrow"
            ),
        ]
    return Frontier(name, runs, optima, *_line(optima), np.array(lines).reshape(-1, 2), notes)
