"""Estimated memory of one rank, by formula.

tests/train/test_memory.py compares it with measured ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.cross_entropy.chunking import DEFAULT_BUDGET, MIB, BudgetError, Chunking, plan_chunks
from kernels.cross_entropy.interface import wide_logits
from nextpt.base.errors import ConfigError
from nextpt.config import Config
from nextpt.model import ModelSpec, count

# Elements; what the engine gives to DeepSpeed. Below DeepSpeed's 5e8: 0.8 GB of fp32 is enough for
# a link to be busy.
REDUCE_BUCKET = 200_000_000
LIVE_PARAMETERS = 1_000_000_000  # ZeRO-3: parameters gathered at once (DeepSpeed's own default)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank.

    States: arXiv 1910.02054 section 3; activations: arXiv 2205.05198 section 4, without dropout.

    buffers: what DeepSpeed 0.19 stages gradients and gathered parameters in.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.buffers
            + self.activations
            + self.loss
        )


def reduce_bucket(config: Config) -> int:
    """Elements of DeepSpeed's reduction bucket: never larger than the model."""
    return min(count(ModelSpec.from_config(config)).parameters, REDUCE_BUCKET)


def estimate_memory(config: Config, world_size: int, *, device: str = "cpu") -> MemoryEstimate:
    """Memory of one of `world_size` ranks: weights (2 or 4 bytes), fp32 gradients, fp32 master weights and moments.

    Stage 1 divides the optimizer state, stage 2 the gradients too, stage 3 the weights too. fp32
    training needs no separate master weights at stage 0; DeepSpeed keeps a partition of them from
    stage 1 on. hpZ keeps a second share of the weights in every node. device: on cuda gradients are
    reduced beside the backward pass, which takes a second bucket, and the loss has a larger
    workspace.
    """
    train, parameters = config.train, count(ModelSpec.from_config(config)).parameters
    stage = train.zero_stage
    width = 2 if train.precision == "bf16" else 4
    master = 4 if stage else 0

    def share(size: int, from_stage: int) -> int:
        return -(-size // world_size) if stage >= from_stage else size

    return MemoryEstimate(
        weights=share(width * parameters, 3)
        + (width * parameters // train.hpz_ranks if stage == 3 and train.hpz_ranks else 0),
        gradients=share(4 * parameters, 2),
        optimizer=share((master + 8) * parameters, 1),
        buffers=_buffers(config, width, device == "cuda"),
        activations=_activations(config, width),
        loss=loss_chunking(config, device).workspace
        + width * config.model.vocab_size * config.model.width,
    )


def _buffers(config: Config, width: int, overlap: bool) -> int:
    """Bytes of staging, found by reading DeepSpeed 0.19.8 and by measuring.

    Stage 1 in bf16 copies a bucket of fp32 gradients for its all-reduce. Stage 2 has a bucket in
    the width of the weights, and in bf16 its fp32 image. Stage 3 has an fp32 bucket, its rearranged
    copy, and whole gathered layers.
    """
    bucket, stage = reduce_bucket(config), config.train.zero_stage
    if stage < 2:
        return 4 * bucket if stage == 1 and width == 2 else 0
    if stage == 2:
        return width * bucket * (2 if overlap else 1) + (4 * bucket if width == 2 else 0)
    return 4 * bucket * (3 if overlap else 2) + width * min(
        count(ModelSpec.from_config(config)).parameters, LIVE_PARAMETERS
    )


def _activations(config: Config, width: int) -> int:
    """Tensors kept for the backward pass of one micro-batch, and the gradients of the block at work.

    Per token and block: the inputs of both norms and their images (torch keeps both where the norm
    is not fused), the inputs of the matrices, queries, keys, values and output of attention, which
    keeps no score matrix (flash attention).
    """
    c, tokens = config.model, config.train.micro_batch_size * config.data.sequence_length
    queries, keys = c.heads * c.head_dim_, c.kv_heads_ * c.head_dim_
    attention = 2 * queries + 2 * keys + (queries + keys if c.qk_norm else 0)
    ffn = (4 if c.ffn == "swiglu" else 2) * c.ffn_width_
    block = 6 * c.width + attention + ffn
    kept = c.depth * c.width + block if config.train.activation_checkpointing else c.depth * block
    # Gradients of the widest tensors; the others take the place of what is freed
    at_work = ffn // 2 + 2 * c.width
    return width * tokens * (kept + 2 * c.width + at_work)


def loss_chunking(config: Config, device: str) -> Chunking:
    """How the loss divides the tokens of a micro-batch on a device.

    Raises ConfigError when its workspace is too small.
    """
    train = config.train
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    wide = wide_logits(
        device, dtype, torch.float32 if train.loss_logits_fp32 else None, True, "torch"
    )
    budget = train.loss_workspace_mib * MIB if train.loss_workspace_mib else DEFAULT_BUDGET[device]
    try:
        return plan_chunks(
            train.micro_batch_size * config.data.sequence_length,
            config.model.width,
            config.model.vocab_size,
            logits_bytes=4 if wide else dtype.itemsize,
            gradient_bytes=dtype.itemsize,
            budget=budget,
            mode=train.loss_gradient,
        )
    except BudgetError as error:
        raise ConfigError(f"train.loss_workspace_mib = {budget // MIB}: {error}") from None


def usual_device(config: Config) -> str:
    """Where such a run belongs when nobody says: bf16 is for GPUs."""
    return "cuda" if config.train.precision == "bf16" else "cpu"
