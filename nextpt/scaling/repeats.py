"""Scaling law of repeated data (Muennighoff et al., arXiv 2305.16264, section 3.1).

L = E + A / N'^alpha + B / D'^beta with D' = U_D (1 + R_D* (1 - exp(-R_D / R_D*))), where U_D are
the unique tokens and R_D = D / U_D - 1 the repetitions; N' likewise with U_N = min(N, the
compute-optimal N of U_D tokens) and R_N = N / U_N - 1. The paper fits the half-lives R_N* and R_D*
with the other constants held at those of runs of one epoch; so does a fit that holds them. Without,
all seven are fitted together, since N' differs from N in runs of one epoch too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from nextpt.base.errors import ScalingError
from nextpt.scaling.allocation import interval, optimum
from nextpt.scaling.fitting import BEST_STARTS, DELTA, SEED, Fit, Problem, check
from nextpt.scaling.laws import CHINCHILLA, Centre, Constants
from nextpt.scaling.observations import FLOPS_PER_PARAMETER_AND_TOKEN, Runs
from nextpt.scaling.solver import MIN_DELTA, Model, huber, minimise

ONE_EPOCH = 1.001  # D / U_D up to which tokens count as seen once
# Range of the half-lives; published: R_N* 5.31, R_D* 15.39. From the upper end on, repetition is
# worth as much as new data; below the lower one, nothing
HALF_LIVES = (0.1, 1000.0)
LOG_HALF_LIVES = (float(np.log(HALF_LIVES[0])), float(np.log(HALF_LIVES[1])))
AT_BOUND = 1e-3  # relative distance within which a half-life is at an end of its range
GRID = 25
STEP = 1e-5  # of theta, for slopes by central differences
NAMES = (*CHINCHILLA.constants, "R_N", "R_D")
# Factor on either side of Chinchilla's optimal N within which that of repeated data is searched,
# and the sizes that each round of the search compares; three rounds give N to 1e-6
SEARCH = 1e4
SIZES, ROUNDS = 400, 3


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
        fixed: Name -> value of the constants that were held.
    """

    runs: Runs
    constants: Constants
    objective: float
    delta: float
    resamples: Constants
    notes: list[str]
    fixed: dict[str, float] = field(default_factory=dict)

    def on(self, unique_tokens: float) -> Fit:
        """Return the law of runs on a corpus of `unique_tokens`, repeated where D is larger."""
        runs = self.runs
        assert runs.unique_tokens is not None  # fit_repeated
        law = replace(
            CHINCHILLA,
            name="repeated",
            formula="L = E + A / N'^alpha + B / D'^beta",
            source="Muennighoff et al., arXiv 2305.16264",
            constants=tuple(name for name in NAMES if name not in self.fixed),
            loss=lambda c, parameters, tokens: loss(c, parameters, tokens, unique_tokens),
            optimal=lambda c, flops: _optimal_parameters(c, flops, unique_tokens),
        )
        fitted = loss(self.constants, runs.parameters, runs.tokens, runs.unique_tokens)
        return Fit(
            law,
            runs,
            self.delta,
            self.constants,
            self.objective,
            np.log(fitted / runs.loss),
            self.resamples,
            "runs" if self.resamples else None,
        )


def loss(
    constants: Constants,
    parameters: np.ndarray,
    tokens: np.ndarray,
    unique_tokens: np.ndarray | float,
) -> np.ndarray:
    """Return nats per token; all arguments broadcast."""
    alpha, beta = constants["alpha"], constants["beta"]
    unique = np.asarray(np.minimum(unique_tokens, tokens))
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


def _optimal_parameters(constants: Constants, flops: float, unique_tokens: float) -> np.ndarray:
    """Return the N of the least loss at D = C / (6 N), of one fit [] or of resamples [R].

    The law has no closed form of it, and with much repetition more than one valley: a grid about
    Chinchilla's optimum is refined about its lowest point.
    """
    columns = {name: np.asarray(value)[..., None] for name, value in constants.items()}
    centre = np.log(optimum(CHINCHILLA, columns, flops)[0])
    reach = np.log(SEARCH)
    for _ in range(ROUNDS):
        sizes = centre + np.linspace(-reach, reach, SIZES)
        parameters = np.exp(sizes)
        tokens = flops / FLOPS_PER_PARAMETER_AND_TOKEN / parameters
        losses = loss(columns, parameters, tokens, unique_tokens)
        centre = np.take_along_axis(sizes, np.nanargmin(losses, axis=-1)[..., None], -1)
        reach *= 4 / SIZES
    return np.asarray(np.exp(centre[..., 0]))


class _Search:
    """The problem of a fit: theta is Chinchilla's five, and ln of the two half-lives.

    Args:
        runs: With unique tokens.
        centre: Of Chinchilla's theta.
        fixed: Name -> value of the constants that are held.
    """

    def __init__(self, runs: Runs, centre: Centre, fixed: Mapping[str, float]) -> None:
        self.runs = runs
        self.centre = centre
        self.fixed = fixed
        self.target = np.log(runs.loss)

    def hold(self, theta: np.ndarray) -> np.ndarray:
        """Return theta [R, 7] with the fixed constants at their values."""
        held = theta.copy()
        for name, value in self.fixed.items():
            if name not in ("A", "B"):
                held[:, NAMES.index(name)] = value if name in ("alpha", "beta") else np.log(value)
        # Their logarithms are taken at the means of ln N and ln D, and so move with the exponents
        if "A" in self.fixed:
            held[:, 0] = np.log(self.fixed["A"]) - held[:, 3] * self.centre.log_parameters
        if "B" in self.fixed:
            held[:, 1] = np.log(self.fixed["B"]) - held[:, 4] * self.centre.log_tokens
        return held

    def constants(self, theta: np.ndarray) -> Constants:
        """Return the constants of theta [R, 7]; half-lives beyond their range are at its end."""
        theta = self.hold(theta)
        halves = theta[:, 5:].copy()
        for index, name in enumerate(NAMES[5:]):
            if name not in self.fixed:
                halves[:, index] = np.clip(halves[:, index], *LOG_HALF_LIVES)
        return CHINCHILLA.public(theta[:, :5], self.centre) | dict(
            zip(NAMES[5:], np.exp(halves).T, strict=True)
        )

    def losses(self, theta: np.ndarray) -> np.ndarray:
        """Return ln L [R, n]."""
        columns = {name: values[:, None] for name, values in self.constants(theta).items()}
        assert self.runs.unique_tokens is not None  # fit_repeated
        return np.asarray(
            np.log(loss(columns, self.runs.parameters, self.runs.tokens, self.runs.unique_tokens))
        )

    def model(self, held: int | None = None) -> Model:
        """Return ln L and its slopes as a function of theta; index `held` stays where it is."""

        def predict(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            slopes = [
                (self.losses(theta + step) - self.losses(theta - step)) / (2 * STEP)
                for step in STEP * np.eye(len(NAMES))
            ]
            if held is not None:
                slopes[held] = np.zeros_like(slopes[held])
            return self.losses(theta), np.stack(slopes, axis=-1)

        return predict

    def grid(self, five: np.ndarray) -> np.ndarray:
        """Return theta [GRID^2, 7] of all half-lives of a grid, with Chinchilla's five [5]."""
        points = np.linspace(*LOG_HALF_LIVES, GRID)
        halves = np.stack(np.meshgrid(points, points, indexing="ij"), axis=-1).reshape(-1, 2)
        return self.hold(
            np.concatenate([np.broadcast_to(five, (len(halves), len(five))), halves], axis=1)
        )

    def scores(self, theta: np.ndarray, delta: float) -> np.ndarray:
        """Return the objective of each theta, [R]."""
        return np.asarray(huber(self.losses(theta) - self.target, delta).sum(1))


def fit_repeated(
    runs: Runs,
    *,
    delta: float | None = None,
    bootstrap: int = 0,
    fixed: Mapping[str, float] | None = None,
) -> RepeatedFit:
    """Fit the constants by the Huber loss of ln L; the bootstrap resamples runs.

    Args:
        runs: With unique tokens.
        delta: Of the Huber loss, in units of ln L; None is DELTA, 0 is least absolute deviations.
        bootstrap: Number of resamples.
        fixed: Name -> value of the constants that are held, of NAMES.

    Raises:
        ScalingError: The runs cannot determine the constants, or a value cannot be held.
    """
    fixed = dict(fixed or {})
    check_fixed(fixed)
    once = _runs_of_one_epoch(runs, fixed)
    delta = DELTA if delta is None else delta
    if set(CHINCHILLA.constants) <= set(fixed):
        # hold() puts the five in their places, wherever the start is
        centre = Centre(float(np.log(runs.parameters).mean()), float(np.log(runs.tokens).mean()))
        five = np.zeros(len(CHINCHILLA.constants))
    else:
        first = Problem(CHINCHILLA, runs.only(once), delta)
        centre, five = first.centre, first.best()[0]
    search = _Search(runs, centre, fixed)
    starts = search.grid(five)
    order = np.argsort(search.scores(starts, max(delta, DELTA)), kind="stable")[:BEST_STARTS]
    solved, objectives = minimise(
        search.model(), search.target, np.ones((len(order), len(runs))), starts[order], delta
    )
    best, objective = solved[[np.argmin(objectives)]], float(objectives.min())
    resamples = _resample(search, best, bootstrap, delta) if bootstrap else {}
    constants: Constants = {name: float(value[0]) for name, value in search.constants(best).items()}
    constants |= fixed  # without the rounding of their logarithms
    resamples |= {
        name: np.full_like(resamples[name], value) for name, value in fixed.items() if resamples
    }
    notes = _bound_notes(constants, resamples, fixed)
    notes += _flat_notes(search, best, constants, objective, delta)
    return RepeatedFit(runs, constants, objective, delta, resamples, notes, fixed)


def check_fixed(fixed: Mapping[str, float]) -> None:
    """Raise ScalingError for a constant that the law does not have, or no value of it."""
    for name, value in fixed.items():
        if name not in NAMES:
            raise ScalingError(f"--fix {name}: the constants are {', '.join(NAMES)}")
        if not (value > 0 and np.isfinite(value)):
            raise ScalingError(f"--fix {name}={value:g}: expected a finite number above 0")
    if len(fixed) == len(NAMES):
        raise ScalingError("--fix holds all seven constants: nothing is left to fit")


def _runs_of_one_epoch(runs: Runs, fixed: Mapping[str, float]) -> np.ndarray:
    """Return the mask of the runs that see their data once. Raises ScalingError."""
    if runs.unique_tokens is None:
        raise ScalingError(
            "the form repeated needs --unique-column: how many different tokens each run saw"
        )
    once = np.asarray(runs.tokens <= ONE_EPOCH * runs.unique_tokens)
    if (~once).sum() < 3:
        raise ScalingError(
            f"only {(~once).sum()} of {len(runs)} runs repeat their data; 3 or more are needed to"
            " fit two half-lives"
        )
    if set(CHINCHILLA.constants) <= set(fixed):
        return once
    if once.sum() < len(CHINCHILLA.constants) + 1:
        raise ScalingError(
            f"only {once.sum()} of {len(runs)} runs see their data once; the constants besides the"
            f" half-lives need {len(CHINCHILLA.constants) + 1} or more, or hold all five with --fix"
        )
    check(CHINCHILLA, runs.only(once))
    return once


def _resample(search: _Search, best: np.ndarray, number: int, delta: float) -> Constants:
    """Return the constants of resampled runs, each the better of two solutions.

    One starts from the best fit, one from the half-lives of a grid that suit it best: at an end of
    their range the law does not change with them, so that a resample would never leave it.
    """
    n = len(search.runs)
    weights = np.random.RandomState(SEED).multinomial(n, np.full(n, 1 / n), number).astype(float)
    grid = search.grid(best[0, :5])
    scores = weights @ huber(search.losses(grid) - search.target, max(delta, DELTA)).T
    starts = [np.repeat(best, number, 0), grid[scores.argmin(1)]]
    solutions = [minimise(search.model(), search.target, weights, start, delta) for start in starts]
    better = np.argmin([objectives for _, objectives in solutions], axis=0)
    theta = np.stack([solved for solved, _ in solutions])[better, np.arange(number)]
    return search.constants(theta)


def at_bound(name: str, value: np.ndarray | float) -> np.ndarray:
    """Return whether values of a constant are at an end of the range of half-lives."""
    low, high = HALF_LIVES
    value = np.asarray(value)
    is_end = (value < low * (1 + AT_BOUND)) | (value > high * (1 - AT_BOUND))
    return is_end & (name in NAMES[5:])


def constant_interval(
    name: str, values: np.ndarray, level: float
) -> tuple[float | None, float | None]:
    """Return the interval of a constant; an end where the search is bounded is open, None."""
    low, high = interval(values, level)
    is_low = bool(at_bound(name, low)) and low < 1
    is_high = bool(at_bound(name, high)) and high > 1
    return (None if is_low else low), (None if is_high else high)


def _bound_notes(
    constants: Constants, resamples: Constants, fixed: Mapping[str, float]
) -> list[str]:
    """Name the half-lives that the range of the search bounds, in the fit or in its interval."""
    notes = []
    for name in (name for name in NAMES[5:] if name not in fixed):
        is_high = constants[name] > np.sqrt(HALF_LIVES[0] * HALF_LIVES[1])
        if at_bound(name, constants[name]):
            meaning = "as much as the first" if is_high else "nothing"
            what = "tokens" if name == "R_D" else "parameters"
            notes.append(
                f"{name} = {constants[name]:.4g} is the {'upper' if is_high else 'lower'} bound of"
                f" the search ({HALF_LIVES[0]:g} to {HALF_LIVES[1]:g}), not an estimate: to these"
                f" runs further {what} are worth {meaning}; hold it with --fix {name}=VALUE or add"
                " runs with more repetitions"
            )
        if resamples and None in (ends := constant_interval(name, resamples[name], 0.95)):
            side = "upwards" if ends[1] is None else "downwards"
            number = int(at_bound(name, resamples[name]).sum())
            notes.append(
                f"{name}: its interval is open {side}, since {number} of {len(resamples[name])}"
                " resamples end at a bound of the search"
            )
    return notes


def _flat_notes(
    search: _Search, best: np.ndarray, constants: Constants, objective: float, delta: float
) -> list[str]:
    """Name the half-lives whose profile is flat: held at half or twice, all else fitted again."""
    free = len(NAMES) - len(search.fixed)
    allowed = max(objective, 1e-20) * (1 + 1 / max(len(search.runs) - free, 1))
    notes = []
    for index in (i for i in (5, 6) if NAMES[i] not in search.fixed):
        if at_bound(NAMES[index], constants[NAMES[index]]):
            continue
        start = np.repeat(best, 2, axis=0)
        start[:, index] += np.log([0.5, 2.0])
        ones = np.ones((2, len(search.runs)))
        profile = minimise(search.model(index), search.target, ones, start, max(delta, MIN_DELTA))
        if (profile[1] < allowed).any():
            notes.append(
                f"{NAMES[index]}* is not determined: its profile is flat, half or twice"
                f" {constants[NAMES[index]]:.3g} fits about as well"
            )
    return notes
