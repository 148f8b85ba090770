"""Data plan of a run: stages with mixture and context length, their hashes, the limit on epochs.

A stage starts at a position (the first of an optimizer step, where no data was skipped) and has
weights (mixture.quantise_shares) and a longest context. The last stage has no end.
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

# Raise it with every change of the sequence at a position: states of other versions are refused.
ORDER_VERSION = 2


@dataclass(frozen=True)
class Stage:
    """Part of a plan. The names of its fields enter the hash of the plan.

    Attributes:
        start: First position.
        weights: One integer per domain; they sum to mixture.UNIT.
        sequence_length: Longest context, tokens.
    """

    start: int
    weights: tuple[int, ...]
    sequence_length: int


@dataclass(frozen=True)
class DataPlan:
    """Everything but the dataset that the global order is a function of."""

    seed: int
    stages: tuple[Stage, ...]

    def stage_at(self, position: int) -> int:
        """Index of the stage of a position."""
        return bisect.bisect_right(self.stages, position, key=lambda stage: stage.start) - 1

    @property
    def hash(self) -> str:
        """Hash of the whole plan."""
        return self.prefix_hash(None)

    def prefix_hash(self, position: int | None) -> str:
        """Hash of what decides the order before `position`; of the whole plan if None."""
        begun = [
            asdict(stage) for stage in self.stages if position is None or stage.start < position
        ]
        inputs = json.dumps([self.seed, BLOCK, UNIT, WINDOW, position, begun])
        return hashlib.sha256(inputs.encode()).hexdigest()


def build_plan(config: Config, domains: list[str], sizes: list[int]) -> DataPlan:
    """Build the plan that a config describes.

    Args:
        config: The run.
        domains: Domains of the dataset.
        sizes: Training sequences of each domain.

    Returns:
        The plan.

    Raises:
        ConfigError: A mixture names a domain that is missing or empty, or has no share above 0.
    """
    data = config.data
    if not data.stages:
        weights = _weights("data.mixing", data.mixing, domains, sizes)
        return DataPlan(config.run.seed, (Stage(0, weights, data.sequence_length),))
    stages: list[Stage] = []
    steps = 0
    for number, stage in enumerate(data.stages):
        key = f"data.stages.{number}.mixing" if stage.mixing is not None else "data.mixing"
        mixing = data.mixing if stage.mixing is None else stage.mixing
        weights = _weights(key, mixing, domains, sizes)
        start = config.batches.consumed(steps)
        stages.append(Stage(start, weights, stage.sequence_length or data.sequence_length))
        steps += stage.steps or 0
    return DataPlan(config.run.seed, tuple(stages))


def check_max_epochs(
    config: Config, domains: list[str], sizes: list[int], planned: list[int]
) -> None:
    """Refuse a plan with more epochs over a domain than data.max_epochs.

    Args:
        config: The run.
        domains: Domains of the dataset.
        sizes: Training sequences of each domain.
        planned: Sequences of each domain that the whole run reads.

    Raises:
        ConfigError: The limit is exceeded, or names a domain that is missing.
    """
    limits = config.data.max_epochs
    if limits is None:
        return
    if isinstance(limits, dict) and (unknown := limits.keys() - set(domains)):
        raise ConfigError(
            f"data.max_epochs names domain {min(unknown)!r}; the dataset has {', '.join(domains)}"
        )
    for name, size, count in zip(domains, sizes, planned, strict=True):
        limit = limits.get(name) if isinstance(limits, dict) else limits
        if limit is None or count <= limit * size:
            continue
        raise ConfigError(
            f"data.max_epochs allows {limit:g} epochs over domain {name}, but the plan has"
            f" {count / size:.2f}: {count} draws from {size} sequences in {config.total_steps}"
            " steps; give it a smaller share in data.mixing or data.stages, train for fewer steps,"
            " or raise data.max_epochs"
        )


def _weights(
    key: str, mixing: dict[str, float] | None, domains: list[str], sizes: list[int]
) -> tuple[int, ...]:
    if mixing is None:
        if not any(sizes):
            raise ConfigError("the dataset has no training sequences; prepare it with more text")
        return quantise_shares([float(n) for n in sizes])
    for name, share in mixing.items():
        if name not in domains:
            raise ConfigError(f"{key} names domain {name!r}; the dataset has {', '.join(domains)}")
        if not 0 <= share < float("inf"):
            raise ConfigError(f"{key}.{name} = {share} must be finite and >= 0")
        if share > 0 and not sizes[domains.index(name)]:
            raise ConfigError(
                f"{key}.{name} = {share}, but the dataset has no training sequences of it; leave"
                " it out"
            )
    if not any(mixing.values()):
        raise ConfigError(f"{key} gives every domain the share 0; one must be above 0")
    return quantise_shares([mixing.get(name, 0.0) for name in domains])
