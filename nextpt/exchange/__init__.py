"""Model exchange: Hugging Face folders both ways, DeepSpeed checkpoints one way."""

from nextpt.exchange.average import checkpoints_to_average, write_average
from nextpt.exchange.deepspeed_layout import export_deepspeed
from nextpt.exchange.export_hf import export_hf
from nextpt.exchange.import_hf import (
    HFWeights,
    config_from_hf,
    different_keys,
    load_hf,
    same_vocabulary,
)

__all__ = [
    "HFWeights",
    "checkpoints_to_average",
    "config_from_hf",
    "different_keys",
    "export_deepspeed",
    "export_hf",
    "load_hf",
    "same_vocabulary",
    "write_average",
]
