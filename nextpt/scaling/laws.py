"""Scaling laws: loss as a function of parameters N and training tokens D.

Each is a scaled sum of powers, L = (sum_k exp(t_k))^s, with terms t_k linear in the unknowns theta
once logarithms are taken; Kaplan's has a scale s, for the others it is 1. Logarithms of N and D are
taken from their means over the runs: it brings the condition of the normal equations from 4e6 to
4e3 on Chinchilla's runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

# Derivatives of the K terms by theta [K, n, p], and their constant parts [K, n]
Terms = tuple[np.ndarray, np.ndarray]
# Name of a constant -> its value (a float), or one value per resample (float64 [R])
Constants = dict[str, Any]
TINY = 1e-300  # in the place of a coefficient that a fit drove to 0


@dataclass(frozen=True)
class Centre:
    """Means of ln N and ln D over the runs of a fit."""

    log_parameters: float
    log_tokens: float


@dataclass(frozen=True)
class Law:
    """One scaling law.

    Attributes:
        name: Value of --form.
        formula: For messages.
        source: Paper and equation.
        constants: Names of its constants.
        terms: (x, y), the centred logarithms of N and D -> the terms.
        exponents: Indices of theta that are exponents; the others are logarithms of coefficients.
        exponent_names: Their names.
        public: (theta [R, p], centre) -> constants.
        private: (constants of one fit, centre) -> theta [p].
        loss: (constants, N, D) -> nats per token.
        inner: Constants -> (A, B, alpha, beta) of the allocation: for any budget the N that
            minimises L minimises A N^-alpha + B D^-beta.
        optimal: (constants, C) -> the N of the least loss at D = C / (6 N), for a law whose
            allocation is not that of `inner`.
        scaled: The last of theta is the scale s.
        least_squares: Fitted by least squares of the loss in nats, as published, not by the Huber
            loss of its logarithm.
    """

    name: str
    formula: str
    source: str
    constants: tuple[str, ...]
    terms: Callable[[np.ndarray, np.ndarray], Terms]
    exponents: tuple[int, ...]
    exponent_names: tuple[str, ...]
    public: Callable[[np.ndarray, Centre], Constants]
    private: Callable[[Constants, Centre], np.ndarray]
    loss: Callable[[Constants, np.ndarray, np.ndarray], np.ndarray]
    inner: Callable[[Constants], tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]
    optimal: Callable[[Constants, float], np.ndarray] | None = None
    scaled: bool = False
    least_squares: bool = False

    def log_loss(self, theta: np.ndarray, terms: Terms) -> tuple[np.ndarray, np.ndarray]:
        """Return ln L [R, n] of theta [R, p], and its derivatives [R, n, p]."""
        design, added = terms
        logs = np.einsum("knp,rp->krn", design, theta) + added[:, None, :]
        largest = logs.max(0)
        powers = np.exp(logs - largest)
        total = powers.sum(0)
        value = largest + np.log(total)
        slopes = np.einsum("krn,knp->rnp", powers / total, design, optimize=True)
        if not self.scaled:
            return value, slopes
        scale = theta[:, -1:]
        slopes = slopes * scale[:, :, None]
        slopes[:, :, -1] = value
        return scale * value, slopes


def _design(*rows: tuple[np.ndarray | float, ...]) -> np.ndarray:
    n = next(len(cell) for row in rows for cell in row if isinstance(cell, np.ndarray))
    return np.stack(
        [np.stack([np.broadcast_to(cell, n) for cell in row], axis=1) for row in rows]
    ).astype(float)


def _sum(*rows: tuple[np.ndarray | float, ...]) -> Terms:
    design = _design(*rows)
    return design, np.zeros(design.shape[:2])


def _chinchilla_constants(theta: np.ndarray, centre: Centre) -> Constants:
    a, b, e, alpha, beta = theta.T
    return {
        "A": np.exp(a + alpha * centre.log_parameters),
        "B": np.exp(b + beta * centre.log_tokens),
        "E": np.exp(e),
        "alpha": alpha,
        "beta": beta,
    }


def _chinchilla_theta(c: Constants, centre: Centre) -> np.ndarray:
    logs = [np.log(max(float(c[name]), TINY)) for name in ("A", "B", "E")]
    return np.array(
        [
            logs[0] - c["alpha"] * centre.log_parameters,
            logs[1] - c["beta"] * centre.log_tokens,
            logs[2],
            c["alpha"],
            c["beta"],
        ]
    )


def _chinchilla_loss(c: Constants, parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    loss = c["E"] + c["A"] * parameters ** -c["alpha"] + c["B"] * tokens ** -c["beta"]
    return np.asarray(loss)


CHINCHILLA = Law(
    "chinchilla",
    "L = E + A / N^alpha + B / D^beta",
    "Hoffmann et al., arXiv 2203.15556, approach 3",
    ("A", "B", "E", "alpha", "beta"),
    terms=lambda x, y: _sum((1, 0, 0, -x, 0), (0, 1, 0, 0, -y), (0, 0, 1, 0, 0)),
    exponents=(3, 4),
    exponent_names=("alpha", "beta"),
    public=_chinchilla_constants,
    private=_chinchilla_theta,
    loss=_chinchilla_loss,
    inner=lambda c: (c["A"], c["B"], c["alpha"], c["beta"]),
)
OVER_TRAINING = Law(
    "over-training",
    "L = E + A / N^alpha + B / D^alpha",
    "Gadre et al., arXiv 2403.08540, with alpha = beta = 2 eta",
    ("A", "B", "E", "alpha"),
    terms=lambda x, y: _sum((1, 0, 0, -x), (0, 1, 0, -y), (0, 0, 1, 0)),
    exponents=(3,),
    exponent_names=("alpha",),
    least_squares=True,
    public=lambda theta, centre: {
        name: value
        for name, value in _chinchilla_constants(theta[:, [0, 1, 2, 3, 3]], centre).items()
        if name != "beta"
    },
    private=lambda c, centre: _chinchilla_theta({**c, "beta": c["alpha"]}, centre)[:4],
    loss=lambda c, parameters, tokens: _chinchilla_loss(
        {**c, "beta": c["alpha"]}, parameters, tokens
    ),
    inner=lambda c: (c["A"], c["B"], c["alpha"], c["alpha"]),
)


def _kaplan_constants(theta: np.ndarray, centre: Centre) -> Constants:
    p, q, ratio, alpha_d = theta.T
    return {
        "N_c": np.exp(p / ratio + centre.log_parameters),
        "D_c": np.exp(q + centre.log_tokens),
        "alpha_N": ratio * alpha_d,
        "alpha_D": alpha_d,
    }


def _kaplan_theta(c: Constants, centre: Centre) -> np.ndarray:
    ratio = c["alpha_N"] / c["alpha_D"]
    return np.array(
        [
            ratio * (np.log(c["N_c"]) - centre.log_parameters),
            np.log(c["D_c"]) - centre.log_tokens,
            ratio,
            c["alpha_D"],
        ]
    )


def _kaplan_inner(c: Constants) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    ratio = c["alpha_N"] / c["alpha_D"]
    return c["N_c"] ** ratio, c["D_c"], ratio, np.ones_like(ratio)


def _kaplan_loss(c: Constants, parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    inner = (c["N_c"] / parameters) ** (c["alpha_N"] / c["alpha_D"]) + c["D_c"] / tokens
    return np.asarray(inner ** c["alpha_D"])


KAPLAN = Law(
    "kaplan",
    "L = [(N_c / N)^(alpha_N / alpha_D) + D_c / D]^alpha_D",
    "Kaplan et al., arXiv 2001.08361, equation 1.5",
    ("N_c", "D_c", "alpha_N", "alpha_D"),
    terms=lambda x, y: (_design((1, 0, -x, 0), (0, 1, 0, 0)), np.stack([np.zeros_like(y), -y])),
    exponents=(2, 3),
    exponent_names=("alpha_N / alpha_D", "alpha_D"),
    scaled=True,
    public=_kaplan_constants,
    private=_kaplan_theta,
    loss=_kaplan_loss,
    inner=_kaplan_inner,
)
LAWS = {law.name: law for law in (CHINCHILLA, OVER_TRAINING, KAPLAN)}
