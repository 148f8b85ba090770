"""The transformer, its initialisation and its parameter and FLOP counts. No training code."""

from nextpt.model.counts import Counts, count
from nextpt.model.transformer import Decoder, KVCache

__all__ = ["Counts", "Decoder", "KVCache", "count"]
