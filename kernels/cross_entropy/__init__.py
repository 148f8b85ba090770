"""Fused linear layer and vocabulary cross-entropy: from hidden states to the loss and its nats."""

from kernels.cross_entropy.interface import LossOutput, linear_cross_entropy
from kernels.cross_entropy.module import LinearCrossEntropy

__all__ = ["LinearCrossEntropy", "LossOutput", "linear_cross_entropy"]
