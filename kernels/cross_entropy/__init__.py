"""Fused linear + vocabulary cross-entropy: from hidden states and the output matrix to the loss and per-token nats."""

from kernels.cross_entropy.interface import IMPLEMENTATIONS, LossOutput, linear_cross_entropy, pick
from kernels.cross_entropy.module import LinearCrossEntropy

__all__ = ["IMPLEMENTATIONS", "LinearCrossEntropy", "LossOutput", "linear_cross_entropy", "pick"]
