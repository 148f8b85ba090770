"""Search for learning rate and decay on a proxy: its trials, and what they say of the large run.

The learning rate is searched at the config's decay, then the decay at the best learning rate. Every
trial is a run of a set (run_set.py) in DIR/NAME; a finished one is not trained again, so a search
that was interrupted continues.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from nextpt.base.errors import ScalingError
from nextpt.base.files import atomic_write
from nextpt.config import Config, load_config, to_yaml
from nextpt.data.dataset import check_dataset
from nextpt.data.sequences import load_manifest
from nextpt.events import read_events
from nextpt.scaling.observations import FLOPS_PER_PARAMETER_AND_TOKEN
from nextpt.scaling.optimum import LARGEST_EXPONENT, Optimum, Point, locate, search
from nextpt.scaling.proxy import Transfer, parameters_of, rounded, scaled_values, set_values
from nextpt.scaling.run_set import NamedRun, RunSet, training_flops

PROXY = "proxy.yaml"
NO_DECAY = "no decay is above 0, so none was searched"


class Tuning(RunSet):
    """Trials of a proxy; `base` is its config."""

    seeds: list[int] = Field(min_length=1, description="run.seed of the trials of every value")

    @property
    def proxy(self) -> Config:
        """Config of the proxy, with the values in the middle of the search."""
        return load_config(self.base, warn_deprecated=False)

    def trial(self, lr: float, weight_decay: float, seed: int) -> NamedRun:
        """The run of a trial: lrLR-wdDECAY-sSEED.

        Args:
            lr: Of `optimizer`; groups keep their ratios to it.
            weight_decay: Of `decay_key`, as above; 0 where no decay is searched.
            seed: run.seed.
        """
        section = self.proxy.optimizer
        values = scaled_values(section, "lr", lr / section.lr)
        if decays := set_values(section, "weight_decay"):
            factor = weight_decay / next(iter(decays.values()))
            values |= scaled_values(section, "weight_decay", factor)
        name = f"lr{lr:.3g}-wd{weight_decay:.3g}-s{seed}".replace("+", "")
        overrides = [f"{key}={value}" for key, value in values.items()]
        return NamedRun(name=name, overrides=[*overrides, f"run.seed={seed}"])

    def tokens(self, trial: NamedRun) -> int:
        """Tokens that a trial was trained on, those of its logged steps."""
        events = read_events(self.folder(trial) / "metrics.jsonl")
        return max((int(event["tokens"]) for event in events if "tokens" in event), default=0)


def decay_key(config: Config) -> str | None:
    """Key of the decay that is searched, the first that is set; the others keep their ratios."""
    return next(iter(set_values(config.optimizer, "weight_decay")), None)


def create_tuning(proxy: Config, folder: Path, seeds: int) -> Tuning:
    """Write DIR/proxy.yaml and return the set of trials.

    Args:
        proxy: Config of the proxy.
        folder: DIR.
        seeds: Number of seeds, from the proxy's run.seed on.

    Raises:
        DataError: The dataset is missing, or not the one of the config.
        ScalingError: It has nothing to validate on, or DIR cannot be written.
    """
    if proxy.data.remote is None:
        manifest = load_manifest(proxy.data.path)
        check_dataset(proxy, manifest)
        if not any(counts.sequences for counts in manifest.splits["validation"].values()):
            raise ScalingError(
                f"{proxy.data.path} has no validation split, whose loss a search compares; prepare"
                " it with validation_fraction above 0"
            )
    path = folder / PROXY
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, keep_same=True) as file:
            file.write(to_yaml(proxy))
    except OSError as error:
        raise ScalingError(f"{path} cannot be written: {error.strerror}") from error
    first = proxy.run.seed
    return Tuning(base=path, dir=folder, seeds=list(range(first, first + seeds)))


@dataclass(frozen=True)
class Tuned:
    """Result of a search.

    Attributes:
        large: Config of the large run, before.
        proxy: Config of the proxy.
        transfer: Factors from the proxy's values to the large run's.
        seeds: Seeds of the trials.
        optima: Best optimizer.lr of the proxy, and best decay where one was searched, by key.
        trials: Every trial: name, loss, tokens.
    """

    large: Config
    proxy: Config
    transfer: Transfer
    seeds: Sequence[int]
    optima: dict[str, Optimum]
    trials: Sequence[dict[str, Any]]

    def factor(self, key: str) -> float:
        """Factor from a value of the proxy to that of the large run."""
        return self.transfer.lr if key.endswith(".lr") else self.transfer.weight_decay

    @property
    def values(self) -> dict[str, float]:
        """Learning rates and decays of the large run by dotted key; groups keep their ratios."""
        values: dict[str, float] = {}
        for key, optimum in self.optima.items():
            name, section = key.rpartition(".")[2], self.large.optimizer
            before = set_values(section, name)[key]
            values |= scaled_values(section, name, optimum.value * self.factor(key) / before)
        return values

    @property
    def intervals(self) -> dict[str, list[float] | None]:
        """Intervals of the proxy times the factors of the large run, by dotted key."""
        return {
            key: [bound * self.factor(key) for bound in optimum.interval]
            if optimum.interval
            else None
            for key, optimum in self.optima.items()
        }

    @property
    def notes(self) -> list[str]:
        """What a user must know of the result."""
        notes = [note for optimum in self.optima.values() for note in optimum.notes]
        return notes if len(self.optima) > 1 else [*notes, NO_DECAY]

    @property
    def cost(self) -> dict[str, Any]:
        """Trials, tokens and FLOPs (C = 6 N D), and the share of the large run's."""
        tokens = sum(trial["tokens"] for trial in self.trials)
        flops = float(FLOPS_PER_PARAMETER_AND_TOKEN * parameters_of(self.proxy) * tokens)
        return {
            "trials": len(self.trials),
            "diverged": sum(trial["loss"] is None for trial in self.trials),
            "tokens": tokens,
            "flops": flops,
            "share": flops / training_flops(self.large),
        }

    def to_json(self) -> dict[str, Any]:
        """Return the result for JSON."""
        proxy = self.proxy
        return {
            "proxy": {
                "width": proxy.model.width,
                "depth": proxy.model.depth,
                "parameters": parameters_of(proxy),
                "steps": proxy.total_steps,
                "batch_size": proxy.train.global_batch_size,
                "tokens": proxy.total_tokens,
            },
            "seeds": list(self.seeds),
            "optima": {key: optimum.to_json() for key, optimum in self.optima.items()},
            "transfer": self.transfer.to_json(),
            "values": self.values,
            "intervals": self.intervals,
            "cost": self.cost,
            "notes": self.notes,
            "trials": list(self.trials),
        }


def run_search(
    tuning: Tuning, large: Config, transfer: Transfer, train: Callable[[NamedRun, int], None]
) -> Tuned:
    """Search the learning rate, then the decay at the best one.

    Args:
        tuning: The trials.
        large: Config of the large run.
        transfer: Factors from the proxy's values to the large run's.
        train: Trains a trial, with its number from 1, to its end or until it diverges.

    Raises:
        ScalingError: A folder holds another run, or every learning rate diverged.
    """
    trials: dict[str, dict[str, Any]] = {}

    def losses(lr: float, weight_decay: float) -> tuple[float, ...]:
        return tuple(measure(tuning.trial(lr, weight_decay, seed)) for seed in tuning.seeds)

    def measure(trial: NamedRun) -> float:
        if tuning.loss(trial) is None:
            train(trial, len(trials) + 1)
        loss = tuning.loss(trial)
        if loss is None:
            raise ScalingError(
                f"{tuning.folder(trial)} has no validation after the last step; remove it, and the"
                " same command trains it again"
            )
        trials[trial.name] = {
            "name": trial.name,
            "loss": loss if math.isfinite(loss) else None,
            "tokens": tuning.tokens(trial),
        }
        return loss

    proxy = tuning.proxy
    section, key = proxy.optimizer, decay_key(proxy)
    decay = set_values(section, "weight_decay")[key] if key else 0.0

    def rate_point(exponent: int) -> Point:
        rate = rounded(section.lr * 2.0**exponent)
        return Point(exponent, rate, losses(rate, decay))

    lr = locate("learning rate", search(rate_point), section.lr)
    if not any(math.isfinite(point.mean) for point in lr.points):
        raise ScalingError(
            f"every learning rate diverged, down to {lr.points[0].value:g}; lower optimizer.lr by a"
            f" factor of {2**LARGEST_EXPONENT}, or look at the data and at {tuning.dir}"
        )
    optima, best = {"optimizer.lr": lr}, rounded(lr.value)

    def decay_point(exponent: int) -> Point:
        value = rounded(decay * 2.0**exponent)
        return Point(exponent, value, losses(best, value))

    if key:
        optima[key] = locate("weight decay", search(decay_point), decay)
    return Tuned(large, proxy, transfer, tuning.seeds, optima, list(trials.values()))
