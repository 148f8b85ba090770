"""A ladder of runs: small ones that a law is fitted to, and a large one whose loss is predicted before it is trained.

The prediction is on disk before the first step of the largest rung, and is not written again once
that rung has begun.
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
from nextpt.events import read_events
from nextpt.model import ModelSpec, count
from nextpt.scaling.fitting import fit
from nextpt.scaling.laws import CHINCHILLA
from nextpt.scaling.observations import read_run_folders
from nextpt.scaling.predict import predict
from nextpt.scaling.record import fit_json, write_json
from nextpt.scaling.run_set import NamedRun, RunSet, read_set, repeated

# Compute of the largest rung over that of the biggest fitted one: less would hardly be a prediction
LEAST_RATIO = 4.0
BOOTSTRAP = 4000
LEVEL = 0.9


class Ladder(RunSet):
    """A ladder as its YAML file says."""

    rungs: list[NamedRun] = Field(description="runs that the law is fitted to")
    target: NamedRun = Field(description="the run that is predicted")

    @property
    def all(self) -> list[NamedRun]:
        return [*self.rungs, self.target]

    def arguments(self, run: NamedRun) -> list[str]:
        """All overrides of a rung: one validation, after the last step."""
        own = super().arguments(run)
        return [
            *own,
            f"validation.every_steps={load_config(self.base, own, warn_deprecated=False).total_steps}",
        ]


def load_ladder(path: Path) -> Ladder:
    """Read and check a ladder, and every rung's config. Raises ScalingError and ConfigError."""
    ladder = read_set(Ladder, path, "a ladder")
    if twice := repeated([rung.name for rung in ladder.all]):
        raise ScalingError(
            f"{path}: two rungs have the name {twice}; each needs a folder of its own"
        )
    if len(ladder.rungs) <= len(CHINCHILLA.constants):
        raise ScalingError(
            f"{path}: {len(ladder.rungs)} rungs are too few; {CHINCHILLA.formula} needs at least"
            f" {len(CHINCHILLA.constants) + 1}"
        )
    biggest = max(ladder.rungs, key=ladder.flops)
    if (ratio := ladder.flops(ladder.target) / ladder.flops(biggest)) < LEAST_RATIO:
        raise ScalingError(
            f"{path}: target {ladder.target.name} takes {ratio:.2f} times the compute of"
            f" {biggest.name}, the biggest that is fitted; {LEAST_RATIO:g} times or more are needed"
            " for a prediction"
        )
    return ladder


def is_done(ladder: Ladder, rung: NamedRun) -> bool:
    """Whether a rung was trained to its end.

    Raises ScalingError where its folder holds another run.
    """
    config, begun = ladder.config(rung), ladder.is_begun(rung)
    events = read_events(ladder.folder(rung) / "metrics.jsonl", "validation")
    return begun and bool(events) and events[-1]["step"] >= config.total_steps


def write_prediction(ladder: Ladder) -> dict[str, Any]:
    """Fit the finished rungs and write DIR/fit.json and DIR/prediction.json.

    What is written before the target began is kept.

    Raises ScalingError where the target has begun without a prediction: none could be honest any
    more.
    """
    path, target = ladder.dir / "prediction.json", ladder.target
    begun = bool(read_events(ladder.folder(target) / "metrics.jsonl"))
    if begun and path.exists():
        return read(path)
    if begun:
        raise ScalingError(
            f"{ladder.folder(target)} has begun and {path} is not there: a prediction must come"
            " first; remove that folder"
        )
    runs = read_run_folders([ladder.folder(rung) for rung in ladder.rungs])
    found = fit(CHINCHILLA, runs, bootstrap=BOOTSTRAP)
    values = fit_json(found)
    write_json(values, ladder.dir / "fit.json")
    config = ladder.config(target)
    made = predict(
        found,
        count(ModelSpec.from_config(config)).parameters,
        config.total_steps * config.tokens_per_step,
        LEVEL,
    )
    made |= {
        "run": str(ladder.folder(target)),
        "written": time.time(),
        "compute_ratio": made["flops"] / float(runs.flops.max()),
        "fit": {name: values[name] for name in ("form", *CHINCHILLA.constants)},
        "warnings": list(dict.fromkeys([*made["warnings"], *values["warnings"]])),
    }
    _write(made, path)
    return made


def write_result(ladder: Ladder) -> dict[str, Any]:
    """DIR/result.json: the prediction beside the measured loss of the finished target. error: predicted / measured - 1."""
    made = read(ladder.dir / "prediction.json")
    runs = read_run_folders([ladder.folder(ladder.target)])
    measured, (low, high) = float(runs.loss[0]), made["interval"]
    first = read_events(ladder.folder(ladder.target) / "metrics.jsonl", "train")[0]["time"]
    result = {
        "predicted": made["loss"],
        "level": made["level"],
        "interval": [low, high],
        "measured": measured,
        "error": made["loss"] / measured - 1,
        "inside": low <= measured <= high,
        "compute_ratio": made["compute_ratio"],
        "prediction_before_first_step": made["written"] < first,
    }
    _write(result, ladder.dir / "result.json")
    return result


def read(path: Path) -> dict[str, Any]:
    """A prediction or result. Raises ScalingError when it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ScalingError(f"{path} cannot be read: {error}") from error


def _write(values: dict[str, Any], path: Path) -> None:
    with atomic_write(path) as file:
        file.write(canonical_json(values))
