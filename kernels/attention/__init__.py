"""Causal attention over packed documents: one call, several implementations."""

from kernels.attention.documents import PackedDocuments, PackedSequences
from kernels.attention.interface import IMPLEMENTATIONS, attention, attention_packed, choose_attention

__all__ = ["IMPLEMENTATIONS", "PackedDocuments", "PackedSequences", "attention", "attention_packed", "choose_attention"]
