"""Ladders: small runs that a law is fitted to, and a large one whose loss is predicted.

The prediction is written before the first step of the largest run, and not written again once that
run has begun.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from pydantic import Field

from nextpt.base.errors import ScalingError
from nextpt.base.files import atomic_write, canonical_json
from nextpt.config import load_config
from nextpt.data.epochs import count_epoch
from nextpt.events import read_events
from nextpt.model import ModelSpec, count
from nextpt.scaling.fitting import fit
from nextpt.scaling.laws import CHINCHILLA
from nextpt.scaling.observations import read_run_folders
from nextpt.scaling.predict import predict
from nextpt.scaling.record import fit_json, write_json
from nextpt.scaling.run_set import NamedRun, RunSet, first_duplicate, read_set

# Compute of the target over that of the largest rung: with less it would hardly be a prediction.
MIN_COMPUTE_RATIO = 4.0
BOOTSTRAP = 4000
LEVEL = 0.9


class Ladder(RunSet):
    """A ladder, as its YAML file describes it."""

    rungs: list[NamedRun] = Field(description="runs that the law is fitted to")
    target: NamedRun = Field(description="the run that is predicted")

    @property
    def all(self) -> list[NamedRun]:
        """The rungs, then the target."""
        return [*self.rungs, self.target]

    def arguments(self, run: NamedRun) -> list[str]:
        """Return all overrides of a run: with one validation, after the last step."""
        overrides = super().arguments(run)
        config = load_config(self.base, overrides, warn_deprecated=False)
        steps = count_epoch(config).total_steps
        return [*overrides, f"validation.every_steps={steps}"]


def load_ladder(path: Path) -> Ladder:
    """Read and check a ladder, and every rung's config. Raises ScalingError and ConfigError."""
    ladder = read_set(Ladder, path, "a ladder")
    if duplicate := first_duplicate([rung.name for rung in ladder.all]):
        raise ScalingError(
            f"{path}: two rungs have the name {duplicate}; each needs a folder of its own"
        )
    if len(ladder.rungs) <= len(CHINCHILLA.constants):
        raise ScalingError(
            f"{path}: {len(ladder.rungs)} rungs are too few; {CHINCHILLA.formula} needs at least"
            f" {len(CHINCHILLA.constants) + 1}"
        )
    largest = max(ladder.rungs, key=ladder.flops)
    if (ratio := ladder.flops(ladder.target) / ladder.flops(largest)) < MIN_COMPUTE_RATIO:
        raise ScalingError(
            f"{path}: target {ladder.target.name} takes {ratio:.2f} times the compute of"
            f" {largest.name}, the largest rung; {MIN_COMPUTE_RATIO:g} times or more are needed"
            " for a prediction"
        )
    return ladder


def is_done(ladder: Ladder, rung: NamedRun) -> bool:
    """Return whether a run is finished. Raises ScalingError where its folder holds another run."""
    return ladder.final_validation(rung) is not None


def write_prediction(ladder: Ladder) -> dict[str, Any]:
    """Fit the finished rungs and write DIR/fit.json and DIR/prediction.json.

    Once the target has begun, the prediction on disk is returned and not written again.

    Raises:
        ScalingError: The target has begun without a prediction.
    """
    path, target = ladder.dir / "prediction.json", ladder.target
    begun = bool(read_events(ladder.folder(target) / "metrics.jsonl"))
    if begun and path.exists():
        return read_result(path)
    if begun:
        raise ScalingError(
            f"{ladder.folder(target)} has begun and {path} does not exist: the prediction must be"
            " written first; remove that folder"
        )
    runs = read_run_folders([ladder.folder(rung) for rung in ladder.rungs])
    law_fit = fit(CHINCHILLA, runs, bootstrap=BOOTSTRAP)
    values = fit_json(law_fit)
    write_json(values, ladder.dir / "fit.json")
    config = ladder.config(target)
    prediction = predict(
        law_fit,
        count(ModelSpec.from_config(config)).parameters,
        config.total_tokens,
        LEVEL,
    )
    prediction |= {
        "run": str(ladder.folder(target)),
        "written": time.time(),
        "compute_ratio": prediction["flops"] / float(runs.flops.max()),
        "fit": {name: values[name] for name in ("form", *CHINCHILLA.constants)},
        "warnings": list(dict.fromkeys([*prediction["warnings"], *values["warnings"]])),
    }
    _write(prediction, path)
    return prediction


def write_result(ladder: Ladder) -> dict[str, Any]:
    """Write DIR/result.json: the prediction beside the measured loss of the finished target.

    Returns:
        Its content; "error" is predicted / measured - 1.
    """
    prediction = read_result(ladder.dir / "prediction.json")
    runs = read_run_folders([ladder.folder(ladder.target)])
    measured, (low, high) = float(runs.loss[0]), prediction["interval"]
    first = read_events(ladder.folder(ladder.target) / "metrics.jsonl", "train")[0]["time"]
    result = {
        "predicted": prediction["loss"],
        "level": prediction["level"],
        "interval": [low, high],
        "measured": measured,
        "error": prediction["loss"] / measured - 1,
        "inside": low <= measured <= high,
        "compute_ratio": prediction["compute_ratio"],
        "prediction_before_first_step": prediction["written"] < first,
    }
    _write(result, ladder.dir / "result.json")
    return result


def read_result(path: Path) -> dict[str, Any]:
    """Read a prediction or a result. Raises ScalingError when the file is damaged."""
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return result
    except (OSError, ValueError, RecursionError) as error:
        raise ScalingError(f"{path} cannot be read: {error}") from error


def _write(values: dict[str, Any], path: Path) -> None:
    with atomic_write(path) as file:
        file.write(canonical_json(values))
