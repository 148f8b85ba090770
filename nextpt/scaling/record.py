"""JSON form of fits: constants, intervals, runs and resamples, all that predictions need."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)

from nextpt.base.errors import ScalingError, first_problem
from nextpt.base.files import atomic_write
from nextpt.scaling.allocation import interval, optimal_exponent
from nextpt.scaling.checks import sensitivity, warnings
from nextpt.scaling.fitting import Fit
from nextpt.scaling.frontier import Frontier
from nextpt.scaling.laws import LAWS, Constants
from nextpt.scaling.observations import Runs
from nextpt.scaling.repeats import HALF_LIVES, NAMES, RepeatedFit, constant_interval

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
LEVEL = 0.95  # of the intervals of constants
DIGITS = 8  # of resamples: far below their scatter


def fit_json(fit: Fit) -> dict[str, Any]:
    """Return the JSON form of a parametric fit.

    Top level: its constants by name; N_c and D_c of L = (N_c/N)^alpha + (D_c/D)^beta + E;
    `intervals`.
    """
    constants = dict(fit.constants) | critical(fit)
    resamples = fit.resamples | critical(fit, resampled=True)
    a = optimal_exponent(fit.law, fit.constants)
    return {
        "form": fit.law.name,
        "formula": fit.law.formula,
        "source": fit.law.source,
        **{name: float(value) for name, value in constants.items()},
        "interval_level": LEVEL,
        "intervals": {name: interval(values, LEVEL) for name, values in resamples.items()} or None,
        "optimal_exponent": {
            "N": float(a),
            "D": 1 - float(a),
            "interval_N": (
                interval(optimal_exponent(fit.law, fit.resamples), LEVEL) if fit.resamples else None
            ),
        },
        "objective": fit.objective,
        "delta": fit.delta,
        "resampled": fit.resampled,
        "refused": fit.refused,
        "residual_rms": float(np.sqrt(np.mean(fit.residuals**2))),
        "warnings": warnings(fit),
        "sensitivity": [asdict(left_out) for left_out in sensitivity(fit)],
        "runs": _runs_json(fit.runs),
        "resamples": {
            name: [float(f"{value:.{DIGITS}g}") for value in values]
            for name, values in fit.resamples.items()
        },
    }


def critical(fit: Fit, *, resampled: bool = False) -> dict[str, Any]:
    """Return N_c = A^(1/alpha), parameters, and D_c = B^(1/beta), tokens; {} for Kaplan's law."""
    c = fit.resamples if resampled else fit.constants
    if "A" not in c:
        return {}
    pairs = {"N_c": (c["A"], c["alpha"]), "D_c": (c["B"], c.get("beta", c["alpha"]))}
    with np.errstate(all="ignore"):  # a tiny exponent makes it as large as numbers get
        return {
            name: np.nan_to_num(np.power(np.asarray(a), 1 / np.asarray(exponent)), nan=0.0)
            for name, (a, exponent) in pairs.items()
        }


def frontier_json(frontier: Frontier) -> dict[str, Any]:
    """Return the JSON form of a frontier (approach 1 or 2)."""
    resampled = len(frontier.resamples) > 0
    return {
        "form": frontier.name,
        "formula": "N = k C^a, D = C / (6 N)",
        "a": frontier.a,
        "b": 1 - frontier.a,
        "log_k": frontier.log_k,
        "interval_level": LEVEL,
        "intervals": {"a": interval(frontier.resamples[:, 0], LEVEL)} if resampled else None,
        "optima": [asdict(o) for o in frontier.optima],
        "warnings": frontier.notes,
        "runs": _runs_json(frontier.runs),
        "resamples": frontier.resamples.tolist(),
    }


def repeated_json(fit: RepeatedFit) -> dict[str, Any]:
    """Return the JSON form of the law of repeated data; R_N and R_D are R_N* and R_D*.

    A constant that was held has no interval; an end at which the search is bounded is null.
    """
    assert fit.runs.unique_tokens is not None  # fit_repeated
    return {
        "form": "repeated",
        "formula": "L = E + A / N'^alpha + B / D'^beta",
        "source": "Muennighoff et al., arXiv 2305.16264",
        **fit.constants,
        "interval_level": LEVEL,
        "intervals": (
            {
                name: None if name in fit.fixed else constant_interval(name, values, LEVEL)
                for name, values in fit.resamples.items()
            }
            or None
        ),
        "fixed": fit.fixed,
        "bounds": {name: list(HALF_LIVES) for name in NAMES[5:] if name not in fit.fixed},
        "objective": fit.objective,
        "delta": fit.delta,
        "warnings": fit.notes,
        "runs": _runs_json(fit.runs) | {"unique_tokens": fit.runs.unique_tokens.tolist()},
        "resamples": {name: values.tolist() for name, values in fit.resamples.items()},
    }


def write_json(values: dict[str, Any], path: Path) -> None:
    """Write a JSON file. Raises ScalingError."""
    try:
        with atomic_write(path) as file:
            json.dump(values, file, indent=1)
            file.write("\n")
    except OSError as error:
        raise ScalingError(f"{path} cannot be written: {error.strerror}") from error


def read_fit(path: Path) -> Fit | Frontier | RepeatedFit:
    """Read a file of `nextpt scaling fit --json`. Raises ScalingError for anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ScalingError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ScalingError(
            f"{path} is not JSON ({error}); give the file that `nextpt scaling fit ... --json`"
            " wrote"
        ) from error
    try:
        return _restore(_Stored.model_validate(values))
    except ValidationError as error:
        problem = first_problem(error)
    except (KeyError, ValueError) as error:
        problem = str(error)
    raise ScalingError(
        f"{path} is not a fit ({problem}); give the file that `nextpt scaling fit ... --json` wrote"
    )


class _StoredRuns(BaseModel):
    """`runs` of a file of a fit."""

    parameters: list[Positive] = Field(min_length=1)
    tokens: list[Positive]
    loss: list[Positive]
    labels: list[str]
    convention: str
    # Files without it were written when every loss was called so
    loss_unit: str = "nats per token"
    unique_tokens: list[Positive] | None = None

    @model_validator(mode="after")
    def _equal_lengths(self) -> Self:
        lengths = {len(self.parameters), len(self.tokens), len(self.loss), len(self.labels)}
        if self.unique_tokens is not None:
            lengths.add(len(self.unique_tokens))
        if len(lengths) > 1:
            raise ValueError("its columns have unequal lengths")
        return self

    def restore(self) -> Runs:
        return Runs(
            np.array(self.parameters),
            np.array(self.tokens),
            np.array(self.loss),
            self.labels,
            self.convention,
            None if self.unique_tokens is None else np.array(self.unique_tokens),
            self.loss_unit,
        )


class _Stored(BaseModel):
    """What is read of a file of a fit; the constants are among the other keys."""

    model_config = ConfigDict(extra="allow")

    form: str
    runs: _StoredRuns
    resamples: dict[str, list[FiniteFloat]] | list[tuple[FiniteFloat, FiniteFloat]]
    warnings: list[str]
    objective: FiniteFloat = 0.0
    delta: float | None = None
    resampled: str | None = None
    refused: int = 0
    fixed: dict[str, Positive] = {}

    def constants(self, names: Sequence[str]) -> Constants:
        """Return constants by name; all are above zero, but E may be zero. Raises ValueError."""
        constants: Constants = {}
        for name in names:
            value = (self.model_extra or {}).get(name)
            number = float(value) if isinstance(value, int | float) else math.nan
            if not 0 <= number < math.inf or (number == 0 and name != "E"):
                raise ValueError(f"{name} is {value!r}, expected a number above 0")
            constants[name] = number
        return constants

    def columns(self, names: Sequence[str]) -> Constants:
        """Return the resamples of these constants, or none. Raises ValueError."""
        columns = self.resamples
        if not isinstance(columns, dict):
            raise ValueError("resamples is a list, expected a column for each constant")
        if columns and (
            not set(names) <= columns.keys()
            or len({len(column) for column in columns.values()}) > 1
        ):
            raise ValueError(f"resamples needs columns of one length for {', '.join(names)}")
        return {name: np.array(column) for name, column in columns.items()}


def _restore(stored: _Stored) -> Fit | Frontier | RepeatedFit:
    """Raises ValueError for values that are none of a fit."""
    runs = stored.runs.restore()
    if stored.form == "repeated":
        if runs.unique_tokens is None or stored.delta is None:
            raise ValueError("it has no unique_tokens or no delta")
        return RepeatedFit(
            runs,
            stored.constants(NAMES),
            stored.objective,
            stored.delta,
            stored.columns([name for name in NAMES if name not in stored.fixed]),
            stored.warnings,
            stored.fixed,
        )
    if stored.form not in LAWS:
        line = _Line.model_validate(stored.model_extra)
        rows = stored.resamples
        if not isinstance(rows, list):
            raise ValueError("resamples has columns, expected pairs of numbers")
        return Frontier(
            stored.form,
            runs,
            [],
            line.a,
            line.log_k,
            np.array(rows, dtype=float).reshape(-1, 2),
            stored.warnings,
        )
    law = LAWS[stored.form]
    constants = stored.constants(law.constants)
    residuals = np.log(law.loss(constants, runs.parameters, runs.tokens) / runs.loss)
    return Fit(
        law,
        runs,
        stored.delta,
        constants,
        stored.objective,
        residuals,
        stored.columns(law.constants),
        stored.resampled,
        stored.refused,
    )


class _Line(BaseModel):
    """The constants of a frontier."""

    a: FiniteFloat
    log_k: FiniteFloat


def _runs_json(runs: Runs) -> dict[str, Any]:
    return {
        "convention": runs.convention,
        "loss_unit": runs.loss_unit,
        "count": len(runs),
        "labels": runs.labels,
        "parameters": runs.parameters.tolist(),
        "tokens": runs.tokens.tolist(),
        "loss": runs.loss.tolist(),
    }
