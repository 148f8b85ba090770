"""Estimated memory of one rank, by formula."""

from __future__ import annotations

from dataclasses import dataclass

from nextpt.config import Config
from nextpt.model import count


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank. States: arXiv 1910.02054 section 3; activations: arXiv 2205.05198 section 4, without dropout."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss


def estimate_memory(config: Config, world_size: int) -> MemoryEstimate:
    """Memory of one of `world_size` ranks: weights (2 or 4 bytes), fp32 gradients, fp32 master weights and moments.

    Stage 1 divides the optimizer state, stage 2 the gradients too, stage 3 the weights too. fp32 training needs no
    separate master weights at stage 0; DeepSpeed keeps a partition of them from stage 1 on.
    """
    train, parameters = config.train, count(config).parameters
    stage = train.zero_stage
    width = 2 if train.precision == "bf16" else 4
    master = 4 if stage else 0

    def share(size: int, from_stage: int) -> int:
        return -(-size // world_size) if stage >= from_stage else size

    return MemoryEstimate(
        weights=share(width * parameters, 3),
        gradients=share(4 * parameters, 2),
        optimizer=share((master + 8) * parameters, 1),
        activations=_activations(config, width),
        loss=_loss_workspace(config),
    )


def _activations(config: Config, width: int) -> int:
    """Tensors kept for the backward pass of one micro-batch; attention keeps no score matrix (flash attention)."""
    c, tokens = config.model, config.train.micro_batch_size * config.data.sequence_length
    boundary = c.width
    attention = 2 * c.width + 2 * c.heads * c.head_dim_ + 2 * c.kv_heads_ * c.head_dim_
    ffn = c.width + (4 if c.ffn == "swiglu" else 2) * c.ffn_width_
    block = boundary + attention + ffn
    kept = c.depth * boundary + block if config.train.activation_checkpointing else c.depth * block
    return width * tokens * (kept + 2 * c.width)


def _loss_workspace(config: Config) -> int:
    """Logits of one chunk (256 MiB at most by default) and the gradient of the output matrix in fp32."""
    c, tokens = config.model, config.train.micro_batch_size * config.data.sequence_length
    return min(4 * tokens * c.vocab_size, 256 * 2**20) + 4 * c.vocab_size * c.width
