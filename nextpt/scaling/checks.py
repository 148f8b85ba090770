"""How far a fit can be trusted: what the runs cannot tell, and how much single runs decide."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nextpt.scaling.allocation import interval, optimum
from nextpt.scaling.fitting import Fit, Problem
from nextpt.scaling.laws import Constants
from nextpt.scaling.observations import SAME, Runs, clusters

FEW_SIZES = 4  # fewer leave the exponent of N and E to trade against each other
NARROW = 1.5  # D/N within this factor in all runs: N and D grew together
FLAT = (0.5, 2.0)  # factors on an exponent that a fit should be able to tell from 1
BEYOND = 10.0  # times the largest fitted compute: where the sensitivity of predictions is told


@dataclass(frozen=True)
class Left:
    """A fit without some of the runs. loss: of the compute-optimal model at BEYOND times the largest compute of all runs."""

    what: str
    runs: int
    constants: dict[str, float]
    loss: float


def warnings(fit: Fit) -> list[str]:
    """What a reader must know before believing the constants, one line each."""
    runs, found = fit.runs, []
    for what, letter, values in (
        ("model sizes", "N", runs.parameters),
        ("numbers of tokens", "D", runs.tokens),
    ):
        if (number := len(clusters(values, SAME))) < FEW_SIZES:
            found.append(
                f"only {number} {what}: the exponent of {letter} and E trade against each other;"
                f" {FEW_SIZES} or more are needed"
            )
    ratio = runs.tokens / runs.parameters
    if ratio.max() < NARROW * ratio.min():
        found.append(
            f"all runs have about one D/N ({ratio.min():.3g} to {ratio.max():.3g} tokens per"
            " parameter): the shares of N and of D cannot be told apart, and nothing follows about"
            " other ratios or the optimum"
        )
    found += [
        f"{name} is not determined: half or twice its value fits about as well"
        for name in _flat(fit)
    ]
    if (e := fit.constants.get("E")) is not None and e < 0.05 * runs.loss.min():
        found.append(
            f"E = {e:.2g} is nearly 0: the runs do not show a floor, so predictions far beyond them"
            " are too low"
        )
    found += refusals(fit)
    for name, values in fit.resamples.items():
        low, high = interval(values, 0.95)
        if name in ("alpha", "beta", "alpha_N", "alpha_D") and high > 3 * max(low, 1e-9):
            found.append(f"{name} is only known to lie between {low:.3g} and {high:.3g} (95 %)")
    return found


def refusals(fit: Fit) -> list[str]:
    """A line where resamples follow no law."""
    if not fit.refused:
        return []
    drawn = fit.refused + len(next(iter(fit.resamples.values()), ()))
    return [
        f"in {fit.refused} of {drawn} resamples loss does not fall with N or D; intervals are of"
        " the others, and too narrow"
    ]


def _flat(fit: Fit) -> list[str]:
    """Exponents whose profile is flat: held at a FLAT multiple, all else fitted again, the objective grows by less than its own size per degree of freedom (one standard error, were it a likelihood)."""
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


def sensitivity(fit: Fit) -> list[Left]:
    """The fit without the highest losses, without the smallest or the largest size, and without the one run that moves it most."""
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
        Left(
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
    """Ranges of what was fitted, in one line."""

    def span(values: np.ndarray) -> str:
        return f"{values.min():.3g} to {values.max():.3g}"

    return (
        f"{len(runs)} runs, {len(runs.sizes())} sizes: N {span(runs.parameters)}, D"
        f" {span(runs.tokens)}, C = 6 N D {span(runs.flops)} FLOPs, loss {span(runs.loss)}"
    )
