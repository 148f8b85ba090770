"""Compute-optimal allocation between parameters and tokens, and the cost of other ones.

C = 6 N D throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nextpt.scaling.fitting import Fit
from nextpt.scaling.laws import Constants, Law
from nextpt.scaling.observations import FLOPS_PER_PARAMETER_AND_TOKEN, Runs

# Sizes in the table of over-training, as fractions of the compute-optimal one
SMALLER = (1.0, 0.75, 0.5, 0.35, 0.25, 0.1)

MAX_TOKENS = 1e30  # more than any number of tokens


@dataclass(frozen=True)
class Priced:
    """A model of `share` of the compute-optimal size.

    Attributes:
        share: Fraction of the optimal size.
        parameters: Its parameters N.
        tokens: Tokens at the same compute.
        loss: Loss at the same compute, nats per token.
        same_loss_tokens: Tokens with which it reaches the optimal model's loss; None where no
            number of tokens does.
        same_loss_flops: Compute of that training.
    """

    share: float
    parameters: float
    tokens: float
    loss: float
    same_loss_tokens: float | None
    same_loss_flops: float | None


def optimum(law: Law, constants: Constants, flops: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the compute-optimal N and D for `flops`.

    N = G (C/6)^(beta/(alpha+beta)), D = C / (6 N), G = (alpha A / (beta B))^(1/(alpha+beta));
    Hoffmann et al., arXiv 2203.15556, equation 4.
    """
    products = flops / FLOPS_PER_PARAMETER_AND_TOKEN
    if law.optimal:
        with np.errstate(all="ignore"):
            parameters = law.optimal(constants, flops)
            return parameters, products / parameters
    a, b, alpha, beta = (np.asarray(value, dtype=float) for value in law.inner(constants))
    # Single resamples may be degenerate; `interval` counts what is not finite
    with np.errstate(all="ignore"):
        log_g = (np.log(alpha * a) - np.log(beta * b)) / (alpha + beta)
        parameters = np.exp(log_g + beta / (alpha + beta) * np.log(products))
        return parameters, products / parameters


def optimal_exponent(law: Law, constants: Constants) -> np.ndarray:
    """Return a of N = k C^a."""
    _, _, alpha, beta = (np.asarray(value, dtype=float) for value in law.inner(constants))
    return np.asarray(beta / (alpha + beta))


def interval(values: np.ndarray, level: float) -> tuple[float, float]:
    """Return the central interval of the resamples at a level, by percentiles.

    Values that are not finite count as the largest number.
    """
    low, high = np.quantile(
        np.where(np.isfinite(values), values, np.finfo(float).max),
        [(1 - level) / 2, (1 + level) / 2],
        method="lower",
    )
    return float(low), float(high)


def predictions(fit: Fit, parameters: float, tokens: float) -> np.ndarray:
    """Return losses [R] of a new run: the law of every resample times the scatter of one run.

    The scatter is that of the fit's residuals, enlarged by sqrt(n / (n - p)) for the p constants
    that were fitted to them.
    """
    n, p = len(fit.runs), len(fit.law.constants)
    generator = np.random.RandomState(0)
    losses = fit.law.loss(fit.resamples, np.asarray(float(parameters)), np.asarray(float(tokens)))
    scatter = -fit.residuals * np.sqrt(n / (n - p))
    return np.asarray(losses * np.exp(generator.choice(scatter, len(losses))))


def extrapolation(runs: Runs, flops: float) -> float:
    """Return the factor by which compute is outside the range of the runs; 1 inside."""
    return max(1.0, flops / float(runs.flops.max()), float(runs.flops.min()) / flops)


def price(fit: Fit, flops: float) -> list[Priced]:
    """Return the training cost of models smaller than the optimum (over-training).

    The cost of inference falls with the share.
    """
    best, _ = optimum(fit.law, fit.constants, flops)
    target = float(fit.loss(best, flops / FLOPS_PER_PARAMETER_AND_TOKEN / best))
    priced = []
    for share in SMALLER:
        parameters = float(best) * share
        tokens = flops / FLOPS_PER_PARAMETER_AND_TOKEN / parameters
        needed = _tokens_for(fit, parameters, target) if share < 1 else tokens
        priced.append(
            Priced(
                share,
                parameters,
                tokens,
                float(fit.loss(parameters, tokens)),
                needed,
                needed and FLOPS_PER_PARAMETER_AND_TOKEN * parameters * needed,
            )
        )
    return priced


def _tokens_for(fit: Fit, parameters: float, loss: float) -> float | None:
    """Return the tokens with which a model reaches a loss, or None where it never does.

    By bisection of ln D: every law falls with D.
    """
    low, high = 0.0, np.log(MAX_TOKENS)
    if fit.loss(parameters, np.exp(high)) > loss:
        return None
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if fit.loss(parameters, np.exp(middle)) > loss else (low, middle)
    return float(np.exp(high))
