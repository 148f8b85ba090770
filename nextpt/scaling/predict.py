"""Predictions from a fit: loss of a new model, allocation of a budget, as plain JSON values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from nextpt.base.errors import ScalingError
from nextpt.scaling.allocation import extrapolation, interval, optimum, predictions, price
from nextpt.scaling.checks import refusals
from nextpt.scaling.fitting import Fit
from nextpt.scaling.frontier import Frontier
from nextpt.scaling.observations import FLOPS_PER_PARAMETER_AND_TOKEN, Runs
from nextpt.scaling.repeats import RepeatedFit

# Times the fitted compute, beyond which the form of the law is more uncertain than its constants
FAR = 100.0


def on_corpus(fit: Fit | Frontier | RepeatedFit, unique_tokens: float | None) -> Fit | Frontier:
    """Return the law of runs on a corpus of `unique_tokens`, which repeated data needs.

    Raises:
        ScalingError: Unique tokens without a fit of repeated data, or the reverse.
    """
    if isinstance(fit, RepeatedFit):
        if unique_tokens is None:
            raise ScalingError(
                "a fit of repeated data needs --unique-tokens: how many different tokens there are"
            )
        return fit.on(unique_tokens)
    if unique_tokens is not None:
        name = fit.law.name if isinstance(fit, Fit) else fit.name
        raise ScalingError(
            f"--unique-tokens is for fits of repeated data, and this is of the form {name}: leave"
            " it out, or fit with --form repeated"
        )
    return fit


def predict(
    fit: Fit,
    parameters: float,
    tokens: float,
    level: float,
    unique_tokens: float | None = None,
) -> dict[str, Any]:
    """Predict the loss in the unit of the runs, the interval of a single new run, and warnings.

    The interval is None without resamples. `unique_tokens` are those of the corpus that `fit` is
    for, see on_corpus.
    """
    flops = FLOPS_PER_PARAMETER_AND_TOKEN * parameters * tokens
    return {
        "parameters": parameters,
        "tokens": tokens,
        "flops": flops,
        "loss": float(fit.loss(parameters, tokens)),
        "loss_unit": fit.runs.loss_unit,
        "level": level,
        "interval": (
            interval(predictions(fit, parameters, tokens), level) if fit.resamples else None
        ),
        "warnings": [
            *_range_warnings(fit.runs, flops),
            *_ratio_warnings(fit.runs, tokens / parameters),
            *_epochs_warnings(fit.runs, tokens, unique_tokens),
            *refusals(fit),
        ],
        **_epochs(tokens, unique_tokens),
    }


def plan_budget(
    fit: Fit | Frontier, flops: float, level: float, unique_tokens: float | None = None
) -> dict[str, Any]:
    """Return the compute-optimal N and D for a budget, with intervals.

    A parametric fit also gives the loss and the price of smaller models.
    """
    if isinstance(fit, Fit):
        best, tokens = (float(value) for value in optimum(fit.law, fit.constants, flops))
        resampled = optimum(fit.law, fit.resamples, flops)[0] if fit.resamples else np.empty(0)
        parametric: dict[str, Any] = {
            "loss": predict(fit, best, tokens, level, unique_tokens),
            "price": [asdict(priced) for priced in price(fit, flops)],
        }
    else:
        best = fit.parameters(flops)
        tokens = flops / FLOPS_PER_PARAMETER_AND_TOKEN / best
        resampled = fit.parameter_resamples(flops) if len(fit.resamples) else np.empty(0)
        parametric = {}
    low, high = interval(resampled, level) if len(resampled) else (0.0, 0.0)
    products = flops / FLOPS_PER_PARAMETER_AND_TOKEN
    return {
        "flops": flops,
        "parameters": best,
        "tokens": tokens,
        "tokens_per_parameter": tokens / best,
        "level": level,
        "parameters_interval": [low, high] if low else None,
        "tokens_interval": [products / high, products / low] if low else None,
        "warnings": _range_warnings(fit.runs, flops),
        **_epochs(tokens, unique_tokens),
        **parametric,
    }


def _range_warnings(runs: Runs, flops: float) -> list[str]:
    factor = extrapolation(runs, flops)
    if factor == 1:
        return []
    where, end = (
        ("largest", runs.flops.max())
        if flops > runs.flops.max()
        else ("smallest", runs.flops.min())
    )
    ratio = f"{factor:,.3g} times" if where == "largest" else f"1/{factor:,.3g} of"
    far = (
        "; so far outside, the form of the law is more in doubt than its constants, which alone"
        " make the interval"
        if factor > FAR
        else ""
    )
    return [
        f"extrapolation: {flops:.3g} FLOPs are {ratio} those of the {where} fitted run"
        f" ({end:.3g}){far}"
    ]


def _ratio_warnings(runs: Runs, ratio: float) -> list[str]:
    low, high = (runs.tokens / runs.parameters).min(), (runs.tokens / runs.parameters).max()
    if low / 1.01 <= ratio <= high * 1.01:
        return []
    return [f"{ratio:.3g} tokens per parameter are outside those fitted ({low:.3g} to {high:.3g})"]


def _epochs(tokens: float, unique_tokens: float | None) -> dict[str, float]:
    if unique_tokens is None:
        return {}
    return {"unique_tokens": unique_tokens, "epochs": max(1.0, tokens / unique_tokens)}


def _epochs_warnings(runs: Runs, tokens: float, unique_tokens: float | None) -> list[str]:
    if unique_tokens is None or runs.unique_tokens is None:
        return []
    largest = float((runs.tokens / runs.unique_tokens).max())
    if tokens / unique_tokens <= largest * 1.01:
        return []
    return [f"{tokens / unique_tokens:.3g} epochs are more than those fitted (up to {largest:.3g})"]
