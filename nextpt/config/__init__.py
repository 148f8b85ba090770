"""Config of a run: schema with bounds, YAML and overrides, error hints, resume rules."""

from nextpt.config.batches import BatchSchedule
from nextpt.config.checkpoint import CheckpointSection
from nextpt.config.data import DataSection, StageSection
from nextpt.config.guard import GuardSection
from nextpt.config.keys import Key, all_keys, describe_keys, flatten
from nextpt.config.loading import load_config, parse_config, read_values, to_yaml
from nextpt.config.model import (
    AttentionGate,
    FeedForwardKind,
    LayerKind,
    ModelSection,
    ParametrizationKind,
    ResidualInit,
    RopeScaling,
)
from nextpt.config.objective import ObjectiveSection
from nextpt.config.optimizer import (
    AdamWGroup,
    MuonSection,
    OptimizerSection,
    ScheduleSection,
    UpdateScale,
)
from nextpt.config.resume_rules import differences, may_change
from nextpt.config.run import RunSection
from nextpt.config.schema import Config
from nextpt.config.trackers import MlflowSection, TrackersSection, WandbSection
from nextpt.config.train import DecayFromSection, LossGradient, TrainSection
from nextpt.config.validation import ValidationSection

__all__ = [
    "AdamWGroup",
    "AttentionGate",
    "BatchSchedule",
    "CheckpointSection",
    "Config",
    "DataSection",
    "DecayFromSection",
    "FeedForwardKind",
    "GuardSection",
    "Key",
    "LayerKind",
    "LossGradient",
    "MlflowSection",
    "ModelSection",
    "MuonSection",
    "ObjectiveSection",
    "OptimizerSection",
    "ParametrizationKind",
    "ResidualInit",
    "RopeScaling",
    "RunSection",
    "ScheduleSection",
    "StageSection",
    "TrackersSection",
    "TrainSection",
    "UpdateScale",
    "ValidationSection",
    "WandbSection",
    "all_keys",
    "describe_keys",
    "differences",
    "flatten",
    "load_config",
    "may_change",
    "parse_config",
    "read_values",
    "to_yaml",
]
