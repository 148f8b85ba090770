"""Fitting a law to runs: starts from a grid of exponents, Huber's loss of ln L, and intervals by the bootstrap.

The objective is the sum, over runs, of Huber's loss of ln L(N, D) - ln L (Hoffmann et al., arXiv
2203.15556, equation 3). A mean in place of the sum stops common optimizers far from the optimum;
here the criterion is relative, and does not mind.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from nextpt.base.errors import ScalingError
from nextpt.scaling.laws import Centre, Constants, Law
from nextpt.scaling.observations import SAME, Runs, clusters
from nextpt.scaling.solver import Model, huber, minimise

DELTA = 1e-3  # Hoffmann et al. and the replication of Besiroglu et al. (arXiv 2404.10102)
GRID = {1: 240, 2: 24}  # points per exponent, by how many there are
EXPONENTS = (0.05, 1.5)  # published ones lie between 0.05 (Kaplan) and 0.7
BEST_STARTS = 8
# Of the published bootstrap (arXiv 2404.10102), whose generator this is too: its figures can be
# repeated
SEED = 42
LEAST = 1e-9  # coefficients and exponents of published laws are above 1e-2
# Fewer than this and resampled runs often leave too little to fit; residuals are resampled then
RUNS_PER_CONSTANT = 5


@dataclass(frozen=True)
class Fit:
    """A law fitted to runs.

    constants: name -> value. delta: of Huber's loss, in units of ln L; None for least squares in
    nats. residuals [n]: ln L of the law - ln L of the run. resamples: name -> values [R] of the
    bootstrap, empty without. resampled: "runs" or "residuals". refused: how many resamples more
    there were, in which loss does not fall with N or D: such a fit would be refused.
    """

    law: Law
    runs: Runs
    delta: float | None
    constants: Constants
    objective: float
    residuals: np.ndarray
    resamples: Constants
    resampled: str | None = None
    refused: int = 0

    def loss(self, parameters: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray:
        return self.law.loss(
            self.constants, np.asarray(parameters, dtype=float), np.asarray(tokens, dtype=float)
        )


class Problem:
    """A law, the runs it is fitted to, and what is minimised."""

    def __init__(self, law: Law, runs: Runs, delta: float | None) -> None:
        self.law, self.runs = law, runs
        self.delta = np.inf if law.least_squares else DELTA if delta is None else delta
        self.centre = Centre(
            float(np.log(runs.parameters).mean()), float(np.log(runs.tokens).mean())
        )
        self.x = np.log(runs.parameters) - self.centre.log_parameters
        self.y = np.log(runs.tokens) - self.centre.log_tokens
        self.terms = law.terms(self.x, self.y)
        self.target = runs.loss if law.least_squares else np.log(runs.loss)

    def model(self, free: np.ndarray | None = None) -> Model:
        """Theta -> predictions in units of the target, with slopes. free [p]: False for what is held fixed."""

        def predict(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            value, slopes = self.law.log_loss(theta, self.terms)
            if self.law.least_squares:
                value = np.exp(value)
                slopes = slopes * value[:, :, None]
            return value, slopes if free is None else slopes * free

        return predict

    def solve(
        self,
        weights: np.ndarray,
        start: np.ndarray,
        target: np.ndarray | None = None,
        free: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Theta [R, p] and objectives [R] for weights [R, n], all begun at start [p] or [R, p]."""
        start = np.broadcast_to(start, (len(weights), start.shape[-1]))
        return minimise(
            self.model(free), self.target if target is None else target, weights, start, self.delta
        )

    def best(self) -> tuple[np.ndarray, float]:
        """The best solution from the most promising starts: theta [p] and its objective."""
        starts = self.starts()
        theta, objective = self.solve(np.ones((len(starts), len(self.runs))), starts)
        chosen = int(np.nanargmin(objective))
        return theta[chosen], float(objective[chosen])

    def starts(self) -> np.ndarray:
        """The BEST_STARTS of a grid over the exponents, with the coefficients that fit best beside them: [S, p]."""
        points = np.geomspace(*EXPONENTS, GRID[len(self.law.exponents)])
        found = [
            self._coefficients(exponents)
            for exponents in itertools.product(points, repeat=len(self.law.exponents))
        ]
        value, _ = self.model()(np.stack(found))
        with np.errstate(invalid="ignore", over="ignore"):
            score = np.nan_to_num(
                huber(value - self.target, max(self.delta, DELTA)).sum(1), nan=np.inf
            )
        return np.stack(found)[np.argsort(score, kind="stable")[:BEST_STARTS]]

    def _coefficients(self, exponents: tuple[float, ...]) -> np.ndarray:
        """Theta [p] with these exponents and coefficients by non-negative least squares of relative errors."""
        design, added = self.terms
        theta = np.zeros(design.shape[2])
        theta[list(self.law.exponents)] = exponents
        columns = np.exp(design @ theta + added).T
        wanted = self.runs.loss ** (1 / theta[-1] if self.law.scaled else 1.0)
        found = nonnegative(columns / wanted[:, None], np.ones(len(wanted)))
        theta[: columns.shape[1]] = np.log(
            np.maximum(found, 1e-6 * (wanted / columns.max(1)).min())
        )
        return theta


def nonnegative(columns: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Non-negative least squares [K] of columns [n, K]: every set of at most three columns is tried, which is exact."""
    best, least = np.zeros(columns.shape[1]), np.inf
    for size in range(1, columns.shape[1] + 1):
        for chosen in map(list, itertools.combinations(range(columns.shape[1]), size)):
            found = np.linalg.lstsq(columns[:, chosen], target, rcond=None)[0]
            cost = float(((columns[:, chosen] @ found - target) ** 2).sum())
            if (found >= 0).all() and cost < least:
                least, best = cost, np.zeros(columns.shape[1])
                best[chosen] = found
    return best


def fit(law: Law, runs: Runs, *, delta: float | None = None, bootstrap: int = 0) -> Fit:
    """Fit a law.

    delta: of Huber's loss, in units of ln L; DELTA unless given, 0 for least absolute deviations.
    bootstrap: resamples. Raises ScalingError for too few runs, runs of one size or one number of
    tokens, and where loss does not fall with N or D.
    """
    check(law, runs)
    if law.least_squares and delta is not None:
        raise ScalingError(
            f"--delta belongs to Huber's loss; the form {law.name} is fitted by least squares in"
            " nats, as published"
        )
    problem = Problem(law, runs, delta)
    theta, objective = problem.best()
    constants = {
        name: float(value[0]) for name, value in law.public(theta[None], problem.centre).items()
    }
    for name, value in constants.items():
        if name != "E" and value < LEAST:
            raise ScalingError(
                f"the runs do not follow {law.formula}: the best fit has {name} = {value:.2g}, so"
                " loss would not fall with"
                f" {'N' if name in ('A', 'alpha', 'N_c', 'alpha_N') else 'D'}; look for runs that"
                " failed, or add some that differ more"
            )
    residuals = np.log(law.loss(constants, runs.parameters, runs.tokens) / runs.loss)
    resampled, resamples, falls = None, {}, np.ones(0, bool)
    if bootstrap:
        resampled = "runs" if len(runs) >= RUNS_PER_CONSTANT * len(law.constants) else "residuals"
        resamples = law.public(_bootstrap(problem, theta, bootstrap, resampled), problem.centre)
        falls = np.all(
            [values >= LEAST for name, values in resamples.items() if name != "E"], axis=0
        )
        resamples = (
            {name: values[falls] for name, values in resamples.items()} if falls.any() else {}
        )
    return Fit(
        law,
        runs,
        None if law.least_squares else problem.delta,
        constants,
        objective,
        residuals,
        resamples,
        resampled,
        int((~falls).sum()),
    )


def check(law: Law, runs: Runs) -> None:
    """Raises ScalingError where the runs cannot determine the law at all.

    nextpt.scaling.checks warns where they hardly do.
    """
    needed = len(law.constants) + 1
    if len(runs) < needed:
        raise ScalingError(
            f"{len(runs)} runs are too few: {law.formula} has {needed - 1} constants and needs at"
            f" least {needed} runs"
        )
    for what, values, term in (
        ("one model size", runs.parameters, "A / N^alpha"),
        ("one number of tokens", runs.tokens, "B / D^beta"),
    ):
        if len(clusters(values, SAME)) == 1:
            raise ScalingError(
                f"all {len(runs)} runs have {what}, {values[0]:.4g}: {term} cannot be told from E;"
                " vary it by a factor of 4 or more"
            )
    if np.ptp(runs.loss) == 0:
        raise ScalingError(f"all {len(runs)} runs have the loss {runs.loss[0]:g}: nothing to fit")


def _bootstrap(problem: Problem, theta: np.ndarray, number: int, resampled: str) -> np.ndarray:
    """Theta [R, p] of resampled runs (weights count how often each was drawn) or of the law with resampled residuals."""
    generator = np.random.RandomState(SEED)
    n = len(problem.runs)
    drawn = generator.choice(n, (number, n), replace=True)
    if resampled == "runs":
        weights = np.zeros((number, n))
        np.add.at(weights, (np.arange(number)[:, None], drawn), 1)
        return problem.solve(weights, theta)[0]
    fitted = problem.model()(theta[None])[0][0]
    # Residuals of a fit are smaller than the noise
    spread = (problem.target - fitted) * np.sqrt(n / (n - len(theta)))
    return problem.solve(np.ones((number, n)), theta, fitted + spread[drawn])[0]
