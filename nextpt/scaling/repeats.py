"""Scaling law of repeated data (Muennighoff et al., arXiv 2305.16264, section 3.1).

L = E + A / N'^alpha + B / D'^beta with D' = U_D (1 + R_D* (1 - exp(-R_D / R_D*))), where U_D are
the unique tokens and R_D = D / U_D - 1 the repetitions; N' likewise with U_N = min(N, the
compute-optimal N of U_D tokens) and R_N = N / U_N - 1. The paper fits the half-lives R_N* and R_D*
after the other constants; here all seven are fitted together, since N' differs from N in runs of
one epoch too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nextpt.base.errors import ScalingError
from nextpt.scaling.fitting import DELTA, SEED, Problem, check
from nextpt.scaling.laws import CHINCHILLA, Constants
from nextpt.scaling.observations import Runs
from nextpt.scaling.solver import MIN_DELTA, huber, minimise

ONE_EPOCH = 1.001  # D / U_D up to which tokens count as seen once
# Range of ln of the half-lives; published: R_N* 5.31, R_D* 15.39
HALF_LIVES = (float(np.log(0.1)), float(np.log(1000.0)))
GRID = 25
STEP = 1e-5  # of theta, for slopes by central differences
NAMES = (*CHINCHILLA.constants, "R_N", "R_D")


@dataclass(frozen=True)
class RepeatedFit:
    """The law fitted to runs.

    Attributes:
        runs: The runs.
        constants: The seven of NAMES.
        objective: Minimum of the sum of Huber losses.
        delta: Of the Huber loss.
        resamples: Name -> values [R] of the bootstrap; empty without.
        notes: Constants that the runs do not determine.
    """

    runs: Runs
    constants: Constants
    objective: float
    delta: float
    resamples: Constants
    notes: list[str]


def loss(
    constants: Constants, parameters: np.ndarray, tokens: np.ndarray, unique: np.ndarray
) -> np.ndarray:
    """Return nats per token; all arguments broadcast."""
    alpha, beta = constants["alpha"], constants["beta"]
    unique = np.minimum(unique, tokens)
    log_g = (np.log(alpha * constants["A"]) - np.log(beta * constants["B"])) / (alpha + beta)
    # From N = G P^(beta/(alpha+beta)) and D = P^(alpha/(alpha+beta)) / G of a budget of P = C / 6,
    # with D = U_D.
    log_optimal = (alpha + beta) / alpha * (log_g + np.log(unique)) - np.log(unique)
    needed = np.minimum(parameters, np.exp(np.minimum(log_optimal, 700)))
    return CHINCHILLA.loss(
        constants,
        _effective(parameters, needed, constants["R_N"]),
        _effective(tokens, unique, constants["R_D"]),
    )


def _effective(amount: np.ndarray, unique: np.ndarray, half_life: np.ndarray) -> np.ndarray:
    """Return D' of D tokens with `unique` ones, or N' of N parameters."""
    return np.asarray(unique * (1 - half_life * np.expm1(-(amount / unique - 1) / half_life)))


def fit_repeated(runs: Runs, *, delta: float | None = None, bootstrap: int = 0) -> RepeatedFit:
    """Fit all seven constants by the Huber loss of ln L; the bootstrap resamples runs.

    Raises:
        ScalingError: The runs cannot determine the constants.
    """
    if runs.unique_tokens is None:
        raise ScalingError(
            "the form repeated needs --unique-column: how many different tokens each run saw"
        )
    unique_tokens = runs.unique_tokens
    once = runs.tokens <= ONE_EPOCH * unique_tokens
    if (~once).sum() < 3:
        raise ScalingError(
            f"only {(~once).sum()} of {len(runs)} runs repeat their data; 3 or more are needed to"
            " fit two half-lives"
        )
    if once.sum() < len(CHINCHILLA.constants) + 1:
        raise ScalingError(
            f"only {once.sum()} of {len(runs)} runs see their data once; the constants besides the"
            f" half-lives need {len(CHINCHILLA.constants) + 1} or more"
        )
    check(CHINCHILLA, runs.only(once))
    delta = DELTA if delta is None else delta
    first = Problem(CHINCHILLA, runs.only(once), delta)
    target, ones = np.log(runs.loss), np.ones((1, len(runs)))

    def constants_of(theta: np.ndarray) -> Constants:
        halves = np.exp(np.clip(theta[:, 5:], *HALF_LIVES)).T
        return CHINCHILLA.public(theta[:, :5], first.centre) | dict(
            zip(NAMES[5:], halves, strict=True)
        )

    def losses(theta: np.ndarray) -> np.ndarray:
        columns = {name: values[:, None] for name, values in constants_of(theta).items()}
        return np.asarray(np.log(loss(columns, runs.parameters, runs.tokens, unique_tokens)))

    def model(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        slopes = [
            (losses(theta + step) - losses(theta - step)) / (2 * STEP)
            for step in STEP * np.eye(len(NAMES))
        ]
        return losses(theta), np.stack(slopes, axis=-1)

    points = np.linspace(*HALF_LIVES, GRID)
    grid = np.stack(np.meshgrid(points, points, indexing="ij"), axis=-1).reshape(-1, 2)
    starts = np.concatenate([np.broadcast_to(first.best()[0], (len(grid), 5)), grid], axis=1)
    start = starts[[np.argmin(huber(losses(starts) - target, max(delta, DELTA)).sum(1))]]
    best, objective = minimise(model, target, ones, start, delta)
    resamples: Constants = {}
    if bootstrap:
        drawn = (
            np.random.RandomState(SEED)
            .multinomial(len(runs), np.full(len(runs), 1 / len(runs)), bootstrap)
            .astype(float)
        )
        resamples = constants_of(
            minimise(model, target, drawn, np.repeat(best, bootstrap, 0), delta)[0]
        )
    constants: Constants = {name: float(value[0]) for name, value in constants_of(best).items()}
    # A profile with all else held: flat there is flat however the others move.
    allowed = max(float(objective[0]), 1e-20) * (1 + 1 / max(len(runs) - len(NAMES), 1))
    moved = best + np.log(2) * np.concatenate([np.eye(7)[5:], -np.eye(7)[5:]])
    flat = (
        (huber(losses(moved) - target, max(delta, MIN_DELTA)).sum(1) < allowed).reshape(2, 2).any(0)
    )
    notes = [
        f"{name}* is not determined: its profile is flat, half or twice {constants[name]:.3g} fits"
        " about as well"
        for name, is_flat in zip(NAMES[5:], flat, strict=True)
        if is_flat
    ]
    return RepeatedFit(runs, constants, float(objective[0]), delta, resamples, notes)
