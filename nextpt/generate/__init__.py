"""Decoding: from a prompt to text."""

from nextpt.generate.sample import Sampling, continuation

__all__ = ["Sampling", "continuation"]
