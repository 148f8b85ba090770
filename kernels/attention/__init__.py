"""Causal attention over packed documents and slices of sequences, in several implementations."""

from kernels.attention.call import AttentionOutput
from kernels.attention.documents import LeftPadded, PackedDocuments, PackedSequences, Packing
from kernels.attention.interface import attention, attention_packed

__all__ = [
    "AttentionOutput",
    "LeftPadded",
    "PackedDocuments",
    "PackedSequences",
    "Packing",
    "attention",
    "attention_packed",
]
