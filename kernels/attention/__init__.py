"""Causal attention over packed documents: one call, several implementations."""

from kernels.attention.documents import LeftPadded, PackedDocuments, PackedSequences
from kernels.attention.interface import (
    IMPLEMENTATIONS,
    attention,
    attention_packed,
    choose_attention,
)

__all__ = [
    "IMPLEMENTATIONS",
    "LeftPadded",
    "PackedDocuments",
    "PackedSequences",
    "attention",
    "attention_packed",
    "choose_attention",
]
