"""Dividing compute between parameters and tokens, and what it costs to divide it otherwise.

C = 6 N D throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nextpt.scaling.fitting import Fit
from nextpt.scaling.laws import Constants, Law
from nextpt.scaling.observations import FLOPS_PER_PARAMETER_AND_TOKEN, Runs

# Sizes whose price is told, as shares of the compute-optimal one
SMALLER = (1.0, 0.75, 0.5, 0.35, 0.25, 0.1)

MOST_TOKENS = 1e30  # stands for any number of tokens


@dataclass(frozen=True)
class Priced:
    """A model of `share` of the compute-optimal size.

    tokens, loss: at the same compute. same_loss_tokens, same_loss_flops: what it takes to reach the
    optimal model's loss all the same; None where no amount of tokens would.
    """

    share: float
    parameters: float
    tokens: float
    loss: float
    same_loss_tokens: float | None
    same_loss_flops: float | None


def optimum(law: Law, constants: Constants, flops: float) -> tuple[np.ndarray, np.ndarray]:
    """Compute-optimal N and D for `flops`: N = G (C/6)^(beta/(alpha+beta)), D = C / (6 N), G = (alpha A / (beta B))^(1/(alpha+beta)).

    Hoffmann et al., arXiv 2203.15556, equation 4.
    """
    a, b, alpha, beta = (np.asarray(value, dtype=float) for value in law.inner(constants))
    products = flops / FLOPS_PER_PARAMETER_AND_TOKEN
    # Single resamples may be degenerate; `interval` counts what is not finite
    with np.errstate(all="ignore"):
        log_g = (np.log(alpha * a) - np.log(beta * b)) / (alpha + beta)
        parameters = np.exp(log_g + beta / (alpha + beta) * np.log(products))
        return parameters, products / parameters


def optimal_exponent(law: Law, constants: Constants) -> np.ndarray:
    """A of N = k C^a."""
    _, _, alpha, beta = (np.asarray(value, dtype=float) for value in law.inner(constants))
    return beta / (alpha + beta)


def interval(values: np.ndarray, level: float) -> tuple[float, float]:
    """The central interval of `level` of the resamples, by percentiles.

    Those that are not finite count as the largest number.
    """
    low, high = np.quantile(
        np.where(np.isfinite(values), values, np.finfo(float).max),
        [(1 - level) / 2, (1 + level) / 2],
        method="lower",
    )
    return float(low), float(high)


def predictions(fit: Fit, parameters: float, tokens: float) -> np.ndarray:
    """Losses [R] that a new run of this size may have: the law of every resample, times the scatter of a single run.

    The scatter is that of the fit's residuals, made larger by sqrt(n / (n - p)) for the p constants
    that were fitted to them.
    """
    n, p = len(fit.runs), len(fit.law.constants)
    generator = np.random.RandomState(0)
    losses = fit.law.loss(fit.resamples, np.asarray(float(parameters)), np.asarray(float(tokens)))
    scatter = -fit.residuals * np.sqrt(n / (n - p))
    return losses * np.exp(generator.choice(scatter, len(losses)))


def extrapolation(runs: Runs, flops: float) -> float:
    """How far compute is outside the range of the runs: 1 inside, the factor beyond its end outside."""
    return max(1.0, flops / runs.flops.max(), runs.flops.min() / flops)


def price(fit: Fit, flops: float) -> list[Priced]:
    """What models smaller than the optimum cost at training time.

    Each is cheaper to run by its share.
    """
    best, _ = optimum(fit.law, fit.constants, flops)
    target = float(fit.loss(best, flops / FLOPS_PER_PARAMETER_AND_TOKEN / best))
    found = []
    for share in SMALLER:
        parameters = float(best) * share
        tokens = flops / FLOPS_PER_PARAMETER_AND_TOKEN / parameters
        needed = _tokens_for(fit, parameters, target) if share < 1 else tokens
        found.append(
            Priced(
                share,
                parameters,
                tokens,
                float(fit.loss(parameters, tokens)),
                needed,
                needed and FLOPS_PER_PARAMETER_AND_TOKEN * parameters * needed,
            )
        )
    return found


def _tokens_for(fit: Fit, parameters: float, loss: float) -> float | None:
    """Tokens after which a model has a loss: bisection of ln D, as every law falls with D.

    None where it never has it.
    """
    low, high = 0.0, np.log(MOST_TOKENS)
    if fit.loss(parameters, np.exp(high)) > loss:
        return None
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if fit.loss(parameters, np.exp(middle)) > loss else (low, middle)
    return float(np.exp(high))
