"""Checks of a fit: undetermined constants, sensitivity to single runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nextpt.scaling.allocation import interval, optimum
from nextpt.scaling.fitting import Fit, Problem
from nextpt.scaling.laws import Constants
from nextpt.scaling.observations import SAME, Runs, clusters

FEW_SIZES = 4  # fewer leave the exponent of N and E to trade against each other
NARROW = 1.5  # D/N within this factor in all runs: N and D grew together
FLAT = (0.5, 2.0)  # factors on an exponent that a fit should distinguish from 1
BEYOND = 10.0  # times the largest fitted compute, where the sensitivity is evaluated


@dataclass(frozen=True)
class LeaveOutFit:
    """A fit without some of the runs.

    Attributes:
        what: Which runs were left out.
        runs: Number of runs of the fit.
        constants: Name -> value.
        loss: Of the compute-optimal model at BEYOND times the largest compute of all runs.
    """

    what: str
    runs: int
    constants: dict[str, float]
    loss: float


def warnings(fit: Fit) -> list[str]:
    """Return warnings about the constants, one line each."""
    runs = fit.runs
    lines: list[str] = []
    for what, letter, values in (
        ("model sizes", "N", runs.parameters),
        ("numbers of tokens", "D", runs.tokens),
    ):
        if (number := len(clusters(values, SAME))) < FEW_SIZES:
            lines.append(
                f"only {number} {what}: the exponent of {letter} and E trade against each other;"
                f" {FEW_SIZES} or more are needed"
            )
    ratio = runs.tokens / runs.parameters
    if ratio.max() < NARROW * ratio.min():
        lines.append(
            f"all runs have about one D/N ({ratio.min():.3g} to {ratio.max():.3g} tokens per"
            " parameter): the shares of N and of D cannot be separated, and nothing follows about"
            " other ratios or the optimum"
        )
    lines += [
        f"{name} is not determined: half or twice its value fits about as well"
        for name in _flat(fit)
    ]
    if (e := fit.constants.get("E")) is not None and e < 0.05 * runs.loss.min():
        lines.append(
            f"E = {e:.2g} is nearly 0: the runs do not show a floor, so predictions far beyond them"
            " are too low"
        )
    lines += refusals(fit)
    for name, values in fit.resamples.items():
        low, high = interval(values, 0.95)
        if name in ("alpha", "beta", "alpha_N", "alpha_D") and high > 3 * max(low, 1e-9):
            lines.append(f"{name} is only known to lie between {low:.3g} and {high:.3g} (95 %)")
    return lines


def refusals(fit: Fit) -> list[str]:
    """Return a warning where loss does not fall with N or D in some resamples."""
    if not fit.refused:
        return []
    drawn = fit.refused + len(next(iter(fit.resamples.values()), ()))
    return [
        f"in {fit.refused} of {drawn} resamples loss does not fall with N or D; intervals are of"
        " the others, and too narrow"
    ]


def _flat(fit: Fit) -> list[str]:
    """Return the exponents whose profile is flat.

    An exponent is held at each multiple of FLAT and all else fitted again; it is flat where the
    objective grows by less than its own value per degree of freedom (one standard error, if it
    were a likelihood).
    """
    problem = Problem(fit.law, fit.runs, fit.delta)
    theta = fit.law.private(fit.constants, problem.centre)
    ones = np.ones((len(FLAT), len(fit.runs)))
    # Rounding leaves about 1e-30 of an exact fit: nothing of it is noise.
    at_best = max(float(problem.solve(ones[:1], theta)[1][0]), 1e-20)
    allowed = at_best * (1 + 1 / (len(fit.runs) - len(fit.law.constants)))
    flat = []
    for index, name in zip(fit.law.exponents, fit.law.exponent_names, strict=True):
        start = np.repeat(theta[None], len(FLAT), axis=0)
        start[:, index] *= FLAT
        free = np.ones(len(theta))
        free[index] = 0
        if (problem.solve(ones, start, free=free)[1] < allowed).any():
            flat.append(name)
    return flat


def sensitivity(fit: Fit) -> list[LeaveOutFit]:
    """Fit again without the highest losses, the smallest or the largest size, or one single run.

    The single run is the one that moves the fit most.
    """
    runs = fit.runs
    order, sizes = np.argsort(-runs.loss), runs.sizes()
    left_out = {
        "all runs": np.array([], dtype=int),
        "without the highest loss": order[:1],
        "without the 5 highest losses": order[:5],
        "without the smallest size": sizes[0],
        "without the largest size": sizes[-1],
    }
    problem = Problem(fit.law, runs, fit.delta)
    masks = np.array(
        [~np.isin(np.arange(len(runs)), out) for out in left_out.values()]
        + list(~np.eye(len(runs), dtype=bool))
    )
    enough = np.array(
        [
            mask.sum() > len(fit.law.constants) and len(clusters(runs.parameters[mask], SAME)) > 1
            for mask in masks
        ]
    )
    masks = masks[enough]
    theta = fit.law.private(fit.constants, problem.centre)
    constants = fit.law.public(problem.solve(masks.astype(float), theta)[0], problem.centre)
    losses = _beyond(fit, constants)
    names = [
        name
        for name, kept in zip(
            [*left_out, *(f"without {label}, which counts most" for label in runs.labels)],
            enough,
            strict=True,
        )
        if kept
    ]
    named = [i for i, name in enumerate(names) if name in left_out]
    single = [i for i in range(len(names)) if i not in named]
    if single:
        named.append(max(single, key=lambda i: abs(losses[i] - losses[0])))
    return [
        LeaveOutFit(
            names[i],
            int(masks[i].sum()),
            {key: float(value[i]) for key, value in constants.items()},
            float(losses[i]),
        )
        for i in named
    ]


def _beyond(fit: Fit, constants: Constants) -> np.ndarray:
    flops = BEYOND * float(fit.runs.flops.max())
    return fit.law.loss(constants, *optimum(fit.law, constants, flops))


def describe(runs: Runs) -> str:
    """Describe the ranges of the runs in one line."""

    def span(values: np.ndarray) -> str:
        return f"{values.min():.3g} to {values.max():.3g}"

    return (
        f"{len(runs)} runs, {len(runs.sizes())} sizes: N {span(runs.parameters)}, D"
        f" {span(runs.tokens)}, C = 6 N D {span(runs.flops)} FLOPs, loss {span(runs.loss)}"
    )
