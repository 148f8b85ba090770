"""Causal attention over packed documents: one call, several implementations."""

from kernels.attention.documents import PackedDocuments
from kernels.attention.interface import IMPLEMENTATIONS, attention, choose_attention

__all__ = ["IMPLEMENTATIONS", "PackedDocuments", "attention", "choose_attention"]
