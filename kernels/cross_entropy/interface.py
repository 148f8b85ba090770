"""The loss call: checks, defaults, the choice of implementation and of chunks."""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from kernels.autocast import autocast
from kernels.choice import Implementation, TritonImplementation, choose
from kernels.cross_entropy import ops, reference
from kernels.cross_entropy.chunking import (
    DEFAULT_BUDGET,
    Chunking,
    Gradient,
    given_chunks,
    plan_chunks,
)
from kernels.cross_entropy.products import multiplies
from kernels.cross_entropy.rows import Statistics, check_targets, mark_absent


class LossOutput(NamedTuple):
    """loss: fp32, sum_i w_i (nats_i + z lse_i^2) / weight_sum.

    [N] or [N, K] for reduction="none". z_loss: its second part, detached.

    nats fp32, unweighted, 0 where ignored, and hits bool, whether the target's logit is above all
    others: in the shape of targets. lse: fp32 [N]. nats and lse are detached but for
    reduction="none".
    """

    loss: Tensor
    z_loss: Tensor
    nats: Tensor
    lse: Tensor
    hits: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    token_weights: Tensor | None = None,
    weight_sum: Tensor | float | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    z_loss_coefficient: float = 0.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "sum",
    gradient: Gradient = "precise",
    logits_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
    chunk_tokens: int | None = None,
    implementation: str = "auto",
) -> LossOutput:
    """Weighted cross-entropy of softmax(hidden weight^T + bias) against targets, in nats.

    hidden [N, D] and weight [V, D] of one floating dtype; bias [V]; targets int64 [N], or [N, K]
    for several targets of one hidden state, whose logits are then computed once; `ignore_index`
    where there is none. token_weights: in the shape of targets, 1 unless given.

    reduction: "sum" divides the weighted sum by `weight_sum`, which comes from outside because it
    spans ranks and micro-batches; the sum of weights of this call unless given. "none" gives the
    loss of each target, times its weight and divided by `weight_sum` (1 unless given), and makes
    nats and lse differentiable; its backward pass computes the logits again.

    z_loss_coefficient: coefficient of lse^2 (arXiv 2204.02311 section 5). softcap c: logits become c tanh(z /
    c) (arXiv 2408.00118). label_smoothing e: the loss of a token becomes (1 - e) nats + e times its
    mean over all entries of the vocabulary (arXiv 1512.00567 section 7); nats stay what they are.

    gradient: "precise" or "small", how the matrix gradient of 16-bit inputs is summed over chunks;
    workspace_bytes: what may exist beside inputs and gradients, 2 GiB on a GPU and 256 MiB on a CPU
    unless given; chunking.plan_chunks says what follows. chunk_tokens: tokens per chunk instead.
    logits_dtype: torch.float32 keeps logits of 16-bit inputs wide; so it is wherever no gradient is
    needed, and on a CPU without units for the dtype.

    Loss and nats are fp32 (fp64 for fp64). Backward once: the gradients are given out, not copied.

    Raises ValueError for shapes that do not fit, a target outside the vocabulary on a CPU (on a GPU
    its nats are nan), a workspace that holds no chunk, an unknown implementation.
    """
    hidden, weight, bias = autocast(hidden, weight, bias)
    check(hidden, weight, targets, token_weights, bias, softcap, label_smoothing, logits_dtype)
    if reduction not in ("sum", "none"):
        raise ValueError(f"reduction = {reduction!r} must be 'sum' or 'none'")
    chosen = pick(implementation, hidden.device.type)
    shape = targets.shape
    targets, scale = prepare(hidden, targets, token_weights, weight_sum, ignore_index, reduction)
    if chosen.name == "reference":
        check_targets(targets, weight.shape[0])
        found = reference.statistics(hidden, weight, bias, targets, softcap)
        return _from_statistics(
            found,
            found.peak + found.log_sum,
            scale,
            z_loss_coefficient,
            label_smoothing,
            reduction,
            weight.shape[0],
            shape,
        )
    needs = [
        torch.is_grad_enabled() and t is not None and t.requires_grad
        for t in (hidden, weight, bias)
    ]
    wide = wide_logits(hidden.device.type, hidden.dtype, logits_dtype, any(needs), chosen.name)
    plan = chunking(
        hidden, weight.shape[0], needs[1], wide, gradient, workspace_bytes, chunk_tokens
    )
    options = (float(softcap or 0.0), plan.rows, plan.sums, wide, chosen.name, needs)
    if reduction == "none":
        nats, lse, total, hits, peak, log_sum = ops.token_statistics(
            hidden, weight, bias, targets, *options
        )
        return _from_statistics(
            Statistics(nats, peak, log_sum, total, hits),
            lse,
            scale,
            z_loss_coefficient,
            label_smoothing,
            "none",
            weight.shape[0],
            shape,
        )
    loss, z_loss, nats, lse, hits, *_ = ops.linear_cross_entropy(
        hidden, weight, bias, targets, scale, z_loss_coefficient, label_smoothing, *options
    )
    return LossOutput(loss, z_loss, nats.reshape(shape), lse, hits.reshape(shape))


def prepare(
    hidden: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    weight_sum: Tensor | float | None,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """(targets [N, K] as mark_absent leaves them, scale [N, K]: weight / weight_sum, 0 where ignored)."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    targets = targets.unsqueeze(1) if targets.dim() == 1 else targets
    valid = targets != ignore_index
    weights = (
        valid.to(wide)
        if token_weights is None
        else torch.where(valid, token_weights.detach().reshape(targets.shape).to(wide), 0.0)
    )
    if weight_sum is None:
        total = weights.sum()
        weight_sum = torch.where(total > 0, total, 1.0) if reduction == "sum" else 1.0
    return mark_absent(targets, ignore_index), weights / (
        weight_sum.detach() if isinstance(weight_sum, Tensor) else weight_sum
    )


def wide_logits(
    device: str, dtype: torch.dtype, wanted: torch.dtype | None, training: bool, kernel: str
) -> bool:
    """Whether logits are kept wider than the inputs: on demand, without gradients, and where products are fp32 anyway."""
    if dtype.itemsize >= 4:
        return False
    return (
        wanted == torch.float32
        or not training
        or (kernel == "torch" and not multiplies(device, dtype))
    )


def chunking(
    hidden: Tensor,
    vocabulary: int,
    needs_weight: bool,
    wide: bool,
    gradient: Gradient,
    workspace_bytes: int | None,
    chunk_tokens: int | None,
) -> Chunking:
    """The chunks of one call.

    Raises BudgetError, and ValueError for what is no budget, no mode or no size.
    """
    if gradient not in get_args(Gradient):
        raise ValueError(f"gradient = {gradient!r} must be one of {', '.join(get_args(Gradient))}")
    for name, value in (("workspace_bytes", workspace_bytes), ("chunk_tokens", chunk_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value} must be at least 1")
    tokens, element = hidden.shape[0], hidden.element_size()
    result = None if not needs_weight else 4 if hidden.dtype == torch.float16 else element
    if chunk_tokens is not None:
        return given_chunks(tokens, chunk_tokens, result, gradient)
    return plan_chunks(
        tokens,
        hidden.shape[1],
        vocabulary,
        logits_bytes=4 if wide else element,
        gradient_bytes=result,
        budget=workspace_bytes or DEFAULT_BUDGET.get(hidden.device.type, DEFAULT_BUDGET["cpu"]),
        mode=gradient,
    )


def _from_statistics(
    s: Statistics,
    lse: Tensor,
    scale: Tensor,
    z_loss_coefficient: float,
    smoothing: float,
    reduction: str,
    vocabulary: int,
    shape: torch.Size,
) -> LossOutput:
    """The loss by its definition, from differentiable statistics."""
    z_losses = scale * z_loss_coefficient * lse.square().unsqueeze(1)
    smooth = (
        s.nats
        if not smoothing
        else (1 - smoothing) * s.nats + smoothing * (lse - s.total / vocabulary).unsqueeze(1)
    )
    losses = scale * smooth + z_losses
    if reduction == "none":
        return LossOutput(
            losses.reshape(shape),
            z_losses.reshape(shape).detach(),
            s.nats.reshape(shape),
            lse,
            s.hits.reshape(shape),
        )
    return LossOutput(
        losses.sum(),
        z_losses.sum().detach(),
        s.nats.reshape(shape).detach(),
        lse.detach(),
        s.hits.reshape(shape),
    )


def check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    label_smoothing: float,
    logits_dtype: torch.dtype | None,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden [N, D] and weight [V, D] do not fit: {tuple(hidden.shape)},"
            f" {tuple(weight.shape)}"
        )
    if hidden.dtype != weight.dtype or not hidden.dtype.is_floating_point:
        raise ValueError(
            f"hidden and weight must have one floating dtype, got {hidden.dtype} and {weight.dtype}"
        )
    if (
        targets.dim() not in (1, 2)
        or targets.shape[:1] != hidden.shape[:1]
        or 0 in targets.shape[1:]
    ):
        raise ValueError(
            f"targets must be [{hidden.shape[0]}] or [{hidden.shape[0]}, K], got"
            f" {tuple(targets.shape)}"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {targets.dtype}")
    if token_weights is not None and token_weights.shape != targets.shape:
        raise ValueError(
            f"token_weights must be {list(targets.shape)}, got {tuple(token_weights.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap = {softcap} must be above 0")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing = {label_smoothing} must be at least 0 and below 1")
    if logits_dtype not in (None, torch.float32, hidden.dtype):
        raise ValueError(
            f"logits_dtype = {logits_dtype} must be torch.float32 or the dtype of hidden,"
            f" {hidden.dtype}"
        )


def pick(implementation: str, device: str) -> Implementation:
    """Triton on a GPU, torch on a CPU, unless one is named. Raises ValueError."""
    return choose(
        IMPLEMENTATIONS,
        ("triton", "torch") if device == "cuda" else ("torch",),
        implementation,
        device,
        (),
    )


def _no_triton() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError:
        return "the package triton is not installed"
    return None


IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": Implementation("reference", reference.statistics, frozenset({"cpu", "cuda"})),
    "torch": Implementation("torch", ops.linear_cross_entropy, frozenset({"cpu", "cuda"})),
    "triton": TritonImplementation(
        "triton", ops.linear_cross_entropy, frozenset({"cuda"}), available=_no_triton
    ),
}
