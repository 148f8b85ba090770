"""Fitting of scaling laws: grid of starts, Huber loss of ln L, bootstrap intervals.

The objective is the sum, over runs, of the Huber loss of ln L(N, D) - ln L (Hoffmann et al., arXiv
2203.15556, equation 3). A mean in place of the sum stops common optimizers far from the optimum;
here the criterion is relative, and does not mind.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

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
MIN_CONSTANT = 1e-9  # coefficients and exponents of published laws are above 1e-2
# Fewer than this and resampled runs often leave too little to fit; residuals are resampled then
RUNS_PER_CONSTANT = 5


@dataclass(frozen=True)
class Fit:
    """A law fitted to runs.

    Attributes:
        law: The law.
        runs: The runs.
        delta: Of the Huber loss, in units of ln L; None for least squares in nats.
        constants: Name -> value.
        objective: Minimum of the objective.
        residuals: ln L of the law - ln L of the run, [n].
        resamples: Name -> values [R] of the bootstrap; empty without.
        resampled: "runs" or "residuals"; None without bootstrap.
        refused: Number of further resamples in which loss does not fall with N or D: such a fit
            would be refused.
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
        """Return the loss of N parameters and D tokens, nats per token."""
        return self.law.loss(
            self.constants, np.asarray(parameters, dtype=float), np.asarray(tokens, dtype=float)
        )


class Problem:
    """A law, the runs that it is fitted to, and the objective."""

    def __init__(self, law: Law, runs: Runs, delta: float | None) -> None:
        self.law = law
        self.runs = runs
        self.delta = np.inf if law.least_squares else DELTA if delta is None else delta
        self.centre = Centre(
            float(np.log(runs.parameters).mean()), float(np.log(runs.tokens).mean())
        )
        self.x = np.log(runs.parameters) - self.centre.log_parameters
        self.y = np.log(runs.tokens) - self.centre.log_tokens
        self.terms = law.terms(self.x, self.y)
        self.target = runs.loss if law.least_squares else np.log(runs.loss)

    def model(self, free: np.ndarray | None = None) -> Model:
        """Return the function theta -> predictions in units of the target, and derivatives.

        Args:
            free: 0 for the parameters that are held fixed, else 1, [p].
        """

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
        """Solve for weights [R, n] from start [p] or [R, p]: theta [R, p] and objectives [R]."""
        start = np.broadcast_to(start, (len(weights), start.shape[-1]))
        return minimise(
            self.model(free), self.target if target is None else target, weights, start, self.delta
        )

    def best(self) -> tuple[np.ndarray, float]:
        """Return the best solution from the best starts: theta [p] and its objective."""
        starts = self.starts()
        theta, objective = self.solve(np.ones((len(starts), len(self.runs))), starts)
        index = int(np.nanargmin(objective))
        return theta[index], float(objective[index])

    def starts(self) -> np.ndarray:
        """Return the BEST_STARTS of a grid over the exponents, with coefficients, [S, p]."""
        points = np.geomspace(*EXPONENTS, GRID[len(self.law.exponents)])
        grid = [
            self._coefficients(exponents)
            for exponents in itertools.product(points, repeat=len(self.law.exponents))
        ]
        value, _ = self.model()(np.stack(grid))
        with np.errstate(invalid="ignore", over="ignore"):
            score = np.nan_to_num(
                huber(value - self.target, max(self.delta, DELTA)).sum(1), nan=np.inf
            )
        return np.stack(grid)[np.argsort(score, kind="stable")[:BEST_STARTS]]

    def _coefficients(self, exponents: tuple[float, ...]) -> np.ndarray:
        """Return theta [p] with these exponents and the coefficients by nnls of relative errors."""
        design, constant_part = self.terms
        theta = np.zeros(design.shape[2])
        theta[list(self.law.exponents)] = exponents
        columns = np.exp(design @ theta + constant_part).T
        target = self.runs.loss ** (1 / theta[-1] if self.law.scaled else 1.0)
        coefficients, _ = nnls(columns / target[:, None], np.ones(len(target)))
        theta[: columns.shape[1]] = np.log(
            np.maximum(coefficients, 1e-6 * (target / columns.max(1)).min())
        )
        return theta


def fit(law: Law, runs: Runs, *, delta: float | None = None, bootstrap: int = 0) -> Fit:
    """Fit a law.

    Args:
        law: The law.
        runs: The runs.
        delta: Of the Huber loss, in units of ln L; None is DELTA, 0 is least absolute deviations.
        bootstrap: Number of resamples.

    Raises:
        ScalingError: Too few runs, runs of one size or one number of tokens, or loss does not fall
            with N or D.
    """
    check(law, runs)
    if law.least_squares and delta is not None:
        raise ScalingError(
            f"--delta is for the Huber loss; the form {law.name} is fitted by least squares in"
            " nats, as published"
        )
    problem = Problem(law, runs, delta)
    theta, objective = problem.best()
    constants: Constants = {
        name: float(value[0]) for name, value in law.public(theta[None], problem.centre).items()
    }
    for name, value in constants.items():
        if name != "E" and value < MIN_CONSTANT:
            raise ScalingError(
                f"the runs do not follow {law.formula}: the best fit has {name} = {value:.2g}, so"
                " loss would not fall with"
                f" {'N' if name in ('A', 'alpha', 'N_c', 'alpha_N') else 'D'}; look for runs that"
                " failed, or add some that differ more"
            )
    residuals = np.log(law.loss(constants, runs.parameters, runs.tokens) / runs.loss)
    resampled: str | None = None
    resamples: Constants = {}
    falls = np.ones(0, bool)
    if bootstrap:
        resampled = "runs" if len(runs) >= RUNS_PER_CONSTANT * len(law.constants) else "residuals"
        resamples = law.public(_bootstrap(problem, theta, bootstrap, resampled), problem.centre)
        falls = np.all(
            [values >= MIN_CONSTANT for name, values in resamples.items() if name != "E"], axis=0
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
    """Raise ScalingError where the runs cannot determine the law at all.

    nextpt.scaling.checks warns where they hardly determine it.
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
                f"all {len(runs)} runs have {what}, {values[0]:.4g}: {term} cannot be separated"
                " from E; vary it by a factor of 4 or more"
            )
    if np.ptp(runs.loss) == 0:
        raise ScalingError(f"all {len(runs)} runs have the loss {runs.loss[0]:g}: nothing to fit")


def _bootstrap(problem: Problem, theta: np.ndarray, number: int, resampled: str) -> np.ndarray:
    """Return theta [R, p] of resampled runs, or of the law with resampled residuals.

    Weights count how often each run was drawn.
    """
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
