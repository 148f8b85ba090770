"""Predictions from a fit: loss of a new model, allocation of a budget, as plain JSON values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from nextpt.scaling.allocation import extrapolation, interval, optimum, predictions, price
from nextpt.scaling.checks import refusals
from nextpt.scaling.fitting import Fit
from nextpt.scaling.frontier import Frontier
from nextpt.scaling.observations import FLOPS_PER_PARAMETER_AND_TOKEN, Runs

# Times the fitted compute, beyond which the form of the law is more uncertain than its constants
FAR = 100.0


def predict(fit: Fit, parameters: float, tokens: float, level: float) -> dict[str, Any]:
    """Predict the loss in nats per token, with the interval of a single new run, and warnings.

    The interval is None without resamples.
    """
    flops = FLOPS_PER_PARAMETER_AND_TOKEN * parameters * tokens
    return {
        "parameters": parameters,
        "tokens": tokens,
        "flops": flops,
        "loss": float(fit.loss(parameters, tokens)),
        "level": level,
        "interval": (
            interval(predictions(fit, parameters, tokens), level) if fit.resamples else None
        ),
        "warnings": [
            *_range_warnings(fit.runs, flops),
            *_ratio_warnings(fit.runs, tokens / parameters),
            *refusals(fit),
        ],
    }


def plan_budget(fit: Fit | Frontier, flops: float, level: float) -> dict[str, Any]:
    """Return the compute-optimal N and D for a budget, with intervals.

    A parametric fit also gives the loss and the price of smaller models.
    """
    if isinstance(fit, Fit):
        best, tokens = (float(value) for value in optimum(fit.law, fit.constants, flops))
        resampled = optimum(fit.law, fit.resamples, flops)[0] if fit.resamples else np.empty(0)
        parametric: dict[str, Any] = {
            "loss": predict(fit, best, tokens, level),
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
