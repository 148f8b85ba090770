"""The decoder: spec, layers, initialisation, parameter and FLOP counts. No training code."""

from nextpt.model.counts import Counts, count
from nextpt.model.decoder import Decoder, DecoderOutput, build_decoder, parameter_shapes
from nextpt.model.layers import KVCache
from nextpt.model.parametrization import Parametrization
from nextpt.model.spec import ComputeOptions, ModelSpec

__all__ = [
    "ComputeOptions",
    "Counts",
    "Decoder",
    "DecoderOutput",
    "KVCache",
    "ModelSpec",
    "Parametrization",
    "build_decoder",
    "count",
    "parameter_shapes",
]
