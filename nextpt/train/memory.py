"""Memory estimate of one rank: weights, gradients, optimizer, buffers, activations, loss.

tests/train/test_memory.py compares it with measured ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.cross_entropy.chunking import DEFAULT_BUDGET, MIB, BudgetError, Chunking, plan_chunks
from kernels.cross_entropy.interface import wide_logits
from nextpt.base.errors import ConfigError
from nextpt.config import Config
from nextpt.model import ModelSpec, count, parameter_shapes
from nextpt.optim.registry import optimizer_spec

# Elements of DeepSpeed's reduction bucket. Below DeepSpeed's 5e8: 0.8 GB of fp32 is enough to keep
# a link busy.
REDUCE_BUCKET = 200_000_000
# Parameters that ZeRO-3 gathers at once (DeepSpeed's own default)
LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank.

    Sources: arXiv 1910.02054 section 3 for the states; arXiv 2205.05198 section 4, without dropout,
    for the activations.

    Attributes:
        weights: Working weights.
        gradients: fp32 gradients.
        optimizer: fp32 master weights, the optimizer's state and averages of the weights.
        buffers: What DeepSpeed 0.19 stages gradients and gathered parameters in.
        activations: Tensors kept for the backward pass.
        loss: Workspace of the loss, and the gradient of the output matrix.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        """All of them together."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.buffers
            + self.activations
            + self.loss
        )


def reduce_bucket(config: Config) -> int:
    """Elements of DeepSpeed's reduction bucket: at most those of the model."""
    return min(count(ModelSpec.from_config(config)).parameters, REDUCE_BUCKET)


def estimate_memory(config: Config, world_size: int, *, device: str = "cpu") -> MemoryEstimate:
    """Estimate the memory of one rank.

    Stage 1 divides the optimizer state, stage 2 the gradients too, stage 3 the weights too. fp32
    training needs no separate master weights at stage 0; DeepSpeed keeps a partition of them from
    stage 1 on. hpZ keeps a second share of the weights in every node.

    Args:
        config: The run.
        world_size: Number of ranks.
        device: "cpu" or "cuda". On cuda gradients are reduced during the backward pass, which takes
            a second bucket, and the loss has a larger workspace.
    """
    train, model = config.train, ModelSpec.from_config(config)
    parameters, stage = count(model).parameters, train.zero_stage
    width = 2 if train.precision == "bf16" else 4
    master = 4 * parameters if stage else 0
    state = optimizer_spec(config).state_bytes(parameter_shapes(model))

    averages = 4 * parameters * len(train.ema_decays)

    def share(size: int, from_stage: int) -> int:
        return -(-size // world_size) if stage >= from_stage else size

    return MemoryEstimate(
        weights=share(width * parameters, 3)
        + (width * parameters // train.hpz_ranks if stage == 3 and train.hpz_ranks else 0),
        gradients=share(4 * parameters, 2),
        optimizer=share(master + state + averages, 1),
        buffers=_buffers(config, width, device == "cuda"),
        activations=_activations(config, width, device),
        # Each depth of multi-token prediction keeps its own gradient of the output matrix
        loss=loss_chunking(config, device).workspace
        + width * model.vocab_size * model.width * (1 + model.mtp_depth),
    )


def _buffers(config: Config, width: int, overlap: bool) -> int:
    """Bytes of staging, from DeepSpeed 0.19.8's source and from measurement.

    Stage 1 in bf16 copies a bucket of fp32 gradients for its all-reduce. Stage 2 has a bucket in
    the width of the weights, and in bf16 its fp32 image. Stage 3 has an fp32 bucket, its rearranged
    copy, and whole gathered layers.

    Args:
        config: The run.
        width: Bytes of a working weight.
        overlap: Whether gradients are reduced during the backward pass.
    """
    bucket, stage = reduce_bucket(config), config.train.zero_stage
    if stage < 2:
        return 4 * bucket if stage == 1 and width == 2 else 0
    if stage == 2:
        return width * bucket * (2 if overlap else 1) + (4 * bucket if width == 2 else 0)
    return 4 * bucket * (3 if overlap else 2) + width * min(
        count(ModelSpec.from_config(config)).parameters, LIVE_PARAMETERS
    )


def _activations(config: Config, width: int, device: str) -> int:
    """Bytes kept for the backward pass of a micro-batch, and of one block's own gradients.

    Per token and block: the inputs of both norms and their images (torch keeps both where the norm
    is not fused), the inputs of the matrices, queries, keys, values and output of attention, its
    gates and the gated output. It keeps no score matrix (flash attention), but for the reference,
    which keeps two in fp32.
    """
    spec = ModelSpec.from_config(config)
    tokens = config.train.micro_batch_size * config.data.sequence_length
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    attention = 2 * queries + 2 * keys + (queries + keys if spec.qk_norm else 0)
    attention += spec.attention_gates + (queries if spec.attention_gates else 0)
    attention += keys if spec.value_residual else 0  # the values before they are mixed
    ffn = (4 if spec.ffn == "swiglu" else 2) * spec.ffn_width
    block = 6 * spec.width + attention + ffn
    if _keeps_scores(config, device):
        block += 2 * spec.heads * config.data.sequence_length * 4 // width
    # Of multi-token prediction: embedding, both norms' images, their concatenation, its product
    module = block + 6 * spec.width
    kept = spec.depth * block + spec.mtp_depth * module
    if config.train.activation_checkpointing:
        kept = (spec.depth + 2 * spec.mtp_depth) * spec.width + (
            module if spec.mtp_depth else block
        )
    # Gradients of the widest tensors; the others reuse what is freed.
    gradients = ffn // 2 + 2 * spec.width
    kept_bytes = width * (kept + 2 * spec.width * (1 + spec.mtp_depth) + gradients)
    return tokens * (kept_bytes + _dropout_masks(config, spec))


def _dropout_masks(config: Config, spec: ModelSpec) -> int:
    """Bytes per token of the masks of dropout that are kept for the backward pass, Booleans."""
    if not config.model.dropout:
        return 0
    blocks = 1 if config.train.activation_checkpointing else spec.depth + spec.mtp_depth
    return spec.width * (1 + 2 * blocks)


def _keeps_scores(config: Config, device: str) -> bool:
    """Whether attention is the reference: by name, or since nothing else on a CPU has sinks."""
    model = config.model
    automatic = model.attention == "auto" and device == "cpu" and model.attention_sinks
    return automatic or model.attention == "reference"


def loss_chunking(config: Config, device: str) -> Chunking:
    """How the loss divides the tokens of a micro-batch on a device.

    Raises:
        ConfigError: `train.loss_workspace_mib` is too small.
    """
    train = config.train
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
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


def default_device(config: Config) -> str:
    """Device type that a run is meant for: bf16 is for GPUs."""
    return "cuda" if config.train.precision == "bf16" else "cpu"
