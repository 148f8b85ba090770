"""Optimizers by the name that the config gives them (`optimizer.kind`)."""

from __future__ import annotations

from nextpt.config import OptimizerSection
from nextpt.optim.adamw import AdamW
from nextpt.optim.muon import Muon
from nextpt.optim.spec import OptimizerSpec

OPTIMIZERS: dict[str, type[OptimizerSpec]] = {AdamW.kind: AdamW, Muon.kind: Muon}


def optimizer_spec(section: OptimizerSection) -> OptimizerSpec:
    """The spec of the optimizer that a config asks for."""
    return OPTIMIZERS[section.kind](section)
