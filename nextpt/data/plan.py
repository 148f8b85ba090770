"""The plan of a run's data: stages with a mixture and a context each, their hashes, and how often rows come again.

A stage starts at a sample (a multiple of the global batch size) and gives `weights`
(mixture.quantise_shares) and the longest context. The last one has no end. Positions in a plan are samples
from 0.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from dataclasses import asdict, dataclass

from nextpt.base.errors import ConfigError
from nextpt.config import Config
from nextpt.data.domain_order import WINDOW
from nextpt.data.mixture import BLOCK, UNIT, quantise_shares

# Raise it with every change of what row a position has: states of another version are refused.
ORDER_VERSION = 2


@dataclass(frozen=True)
class Stage:
    """Samples from `start` on. weights: integers that sum to UNIT, one per domain. sequence_length: longest context, tokens."""

    start: int
    weights: tuple[int, ...]
    sequence_length: int


@dataclass(frozen=True)
class DataPlan:
    """Everything but the dataset that the order of samples is a function of."""

    seed: int
    stages: tuple[Stage, ...]

    def stage_at(self, position: int) -> int:
        """Number of the stage that a sample belongs to."""
        return bisect.bisect_right(self.stages, position, key=lambda stage: stage.start) - 1

    @property
    def hash(self) -> str:
        return self.prefix_hash(None)

    def prefix_hash(self, position: int | None) -> str:
        """Hash of what decides the samples before `position`; of the whole plan if None."""
        begun = [
            asdict(stage) for stage in self.stages if position is None or stage.start < position
        ]
        inputs = json.dumps([self.seed, BLOCK, UNIT, WINDOW, position, begun])
        return hashlib.sha256(inputs.encode()).hexdigest()


def make_plan(config: Config, domains: list[str], rows: list[int]) -> DataPlan:
    """The plan that a config describes, over domains with `rows` training rows each.

    Raises ConfigError when it names a domain that is not there or empty, or has no share above 0.
    """
    data, stages, start = config.data, [], 0
    if not data.stages:
        return DataPlan(
            config.run.seed,
            (Stage(0, _weights("data.mixing", data.mixing, domains, rows), data.sequence_length),),
        )
    for number, stage in enumerate(data.stages):
        key = f"data.stages.{number}.mixing" if stage.mixing is not None else "data.mixing"
        mixing = data.mixing if stage.mixing is None else stage.mixing
        stages.append(
            Stage(
                start,
                _weights(key, mixing, domains, rows),
                stage.sequence_length or data.sequence_length,
            )
        )
        start += (stage.steps or 0) * config.train.global_batch_size
    return DataPlan(config.run.seed, tuple(stages))


def _weights(
    key: str, mixing: dict[str, float] | None, domains: list[str], rows: list[int]
) -> tuple[int, ...]:
    if mixing is None:
        if not any(rows):
            raise ConfigError("the dataset has no training rows")
        return quantise_shares([float(n) for n in rows])
    for name, share in mixing.items():
        if name not in domains:
            raise ConfigError(f"{key} names domain {name!r}; the dataset has {', '.join(domains)}")
        if not 0 <= share < float("inf"):
            raise ConfigError(f"{key}.{name} = {share} must be finite and >= 0")
        if share > 0 and not rows[domains.index(name)]:
            raise ConfigError(f"{key}.{name} = {share}, but the dataset has no training rows of it")
    if not any(mixing.values()):
        raise ConfigError(f"{key} gives every domain the share 0; one must be above")
    return quantise_shares([mixing.get(name, 0.0) for name in domains])


def check_repeats(config: Config, domains: list[str], rows: list[int], given: list[int]) -> None:
    """Refuse a plan that shows rows of a domain more often than data.max_epochs allows. given: samples by domain in all.

    Raises ConfigError.
    """
    caps = config.data.max_epochs
    if caps is None:
        return
    if isinstance(caps, dict) and (unknown := caps.keys() - set(domains)):
        raise ConfigError(
            f"data.max_epochs names domain {min(unknown)!r}; the dataset has {', '.join(domains)}"
        )
    for name, size, samples in zip(domains, rows, given, strict=True):
        cap = caps.get(name) if isinstance(caps, dict) else caps
        if cap is None or samples <= cap * size:
            continue
        raise ConfigError(
            f"data.max_epochs allows {cap:g} passes over domain {name}, but the plan makes"
            f" {samples / size:.2f}: {samples} samples of {size} rows in {config.total_steps}"
            " steps; give it a smaller share in data.mixing or data.stages, train for fewer steps,"
            " or raise the cap"
        )
