"""Optimizers by the name that the config gives them (`optimizer.kind`)."""

from __future__ import annotations

from nextpt.config import Config
from nextpt.model import ModelSpec
from nextpt.optim.adamw import AdamW
from nextpt.optim.muon import Muon
from nextpt.optim.spec import OptimizerSpec

OPTIMIZERS: dict[str, type[OptimizerSpec]] = {AdamW.kind: AdamW, Muon.kind: Muon}


def optimizer_spec(config: Config) -> OptimizerSpec:
    """The spec of the optimizer that a config asks for, for the shape of its model."""
    section, rules = config.optimizer, ModelSpec.from_config(config).rules
    return OPTIMIZERS[section.kind](section, rules)
