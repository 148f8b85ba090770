"""Loss calls: checks of the arguments, the choice of implementation and of chunks."""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from kernels.autocast import autocast
from kernels.choice import choose_cross_entropy
from kernels.cross_entropy import ops, reference
from kernels.cross_entropy.chunking import (
    DEFAULT_BUDGET,
    Chunking,
    Gradient,
    fixed_chunks,
    plan_chunks,
)
from kernels.cross_entropy.products import multiplies
from kernels.cross_entropy.rows import Statistics, check_targets, mark_absent


class LossOutput(NamedTuple):
    """Result of the vocabulary loss; N tokens with one target, or K targets each.

    Attributes:
        loss: fp32 scalar, sum_i w_i (nats_i + z_loss_coefficient lse_i^2) / weight_sum; [N] or
            [N, K] with reduction="none". fp64 for fp64 inputs, as all that follows.
        z_loss: its second part, detached.
        nats: fp32 [N] or [N, K], -log p of the targets, unweighted, 0 where ignored.
        lse: fp32 [N], log-sum-exp of the logits.
        hits: bool in the shape of nats, whether the target's logit is above all others.

    nats and lse are detached but with reduction="none".
    """

    loss: Tensor
    z_loss: Tensor
    nats: Tensor
    lse: Tensor
    hits: Tensor


class _LossCall(NamedTuple):
    """Checked inputs. targets: [N, K]; scale: [N, K], weight / weight_sum; shape: of the result."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    scale: Tensor
    shape: torch.Size
    z_loss_coefficient: float
    label_smoothing: float
    softcap: float | None
    reduction: str


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
    """Compute the weighted cross-entropy of softmax(hidden weight^T + bias), in nats.

    Backward once: the gradients are given out, not copied.

    Args:
        hidden: [N, D], of one floating dtype with `weight`.
        weight: [V, D].
        targets: int64 [N], or [N, K] for several targets of one hidden state, whose logits are
            computed once.
        token_weights: in the shape of targets; 1 unless given.
        weight_sum: divisor of the weighted sum. It comes from outside because it spans ranks and
            micro-batches; the sum of this call's weights (1 for "none") unless given.
        bias: [V].
        ignore_index: target of tokens that have none.
        z_loss_coefficient: factor of lse^2 (arXiv 2204.02311 section 5).
        softcap: c of logits c tanh(z / c) (arXiv 2408.00118).
        label_smoothing: e, the share of a token's mean over the whole vocabulary (arXiv 1512.00567
            section 7) beside 1 - e of its nats, which stay what they are.
        reduction: "sum", or "none" for the loss of each target: then nats and lse are
            differentiable, and the backward pass computes the logits again.
        gradient: how the matrix gradient of 16-bit inputs is summed over chunks.
        logits_dtype: torch.float32 keeps logits of 16-bit inputs wide; so they are without
            gradients, and on a CPU without units for the dtype.
        workspace_bytes: of what exists beside inputs and gradients; 2 GiB on a GPU and 256 MiB on
            a CPU unless given. See chunking.plan_chunks.
        chunk_tokens: tokens per chunk instead.
        implementation: a name of `kernels.choice.CROSS_ENTROPY`, or "auto".

    Raises:
        ValueError: shapes that do not fit, a target outside the vocabulary on a CPU (on a GPU its
            nats are nan), a workspace that holds no chunk, an unknown implementation.
    """
    hidden, weight = autocast(hidden, weight)
    bias = None if bias is None else autocast(bias)[0]
    check(hidden, weight, targets, token_weights, bias, softcap, label_smoothing, logits_dtype)
    if reduction not in ("sum", "none"):
        raise ValueError(f"reduction = {reduction!r} must be 'sum' or 'none'")
    kernel = choose_cross_entropy(implementation, hidden.device.type, hidden.dtype).name
    columns, scale = prepare(hidden, targets, token_weights, weight_sum, ignore_index, reduction)
    options = z_loss_coefficient, label_smoothing, softcap, reduction
    call = _LossCall(hidden, weight, bias, columns, scale, targets.shape, *options)
    if kernel == "reference":
        return _by_reference(call)
    needs = gradients_needed(hidden, weight, bias)
    wide = wide_logits(hidden.device.type, hidden.dtype, logits_dtype, any(needs), kernel)
    memory = gradient, workspace_bytes, chunk_tokens
    plan = chunking(hidden, weight.shape[0], needs[1], wide, *memory)
    return _by_chunks(call, plan, wide, kernel, needs)


def _by_reference(call: _LossCall) -> LossOutput:
    check_targets(call.targets, call.weight.shape[0])
    statistics = reference.statistics(
        call.hidden, call.weight, call.bias, call.targets, call.softcap
    )
    return _from_statistics(call, statistics, statistics.peak + statistics.log_sum)


def _by_chunks(
    call: _LossCall, plan: Chunking, wide: bool, kernel: str, needs: list[bool]
) -> LossOutput:
    inputs = call.hidden, call.weight, call.bias, call.targets
    settings = float(call.softcap or 0.0), plan.rows, plan.sums, wide, kernel, needs
    if call.reduction == "none":
        tokens = ops.TokenStatistics(*ops.token_statistics(*inputs, *settings))
        statistics = Statistics(tokens.nats, tokens.peak, tokens.log_sum, tokens.total, tokens.hits)
        return _from_statistics(call, statistics, tokens.lse)
    result = ops.SummedLoss(
        *ops.linear_cross_entropy(
            *inputs, call.scale, call.z_loss_coefficient, call.label_smoothing, *settings
        )
    )
    nats, hits = result.nats.reshape(call.shape), result.hits.reshape(call.shape)
    return LossOutput(result.loss, result.z_loss, nats, result.lse, hits)


def gradients_needed(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[bool]:
    """Return whether gradients of hidden, weight and bias are needed."""
    leaves = (hidden, weight, bias)
    return [torch.is_grad_enabled() and t is not None and t.requires_grad for t in leaves]


def prepare(
    hidden: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    weight_sum: Tensor | float | None,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Return targets [N, K] as mark_absent leaves them, and weight / weight_sum [N, K].

    The latter is 0 where targets are ignored.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    # Views would order the sums over targets otherwise
    targets = (targets.unsqueeze(1) if targets.dim() == 1 else targets).contiguous()
    valid = targets != ignore_index
    weights = (
        valid.to(wide)
        if token_weights is None
        else torch.where(valid, token_weights.detach().reshape(targets.shape).to(wide), 0.0)
    )
    if weight_sum is None:
        total = weights.sum()
        weight_sum = torch.where(total > 0, total, 1.0) if reduction == "sum" else 1.0
    divisor = weight_sum.detach() if isinstance(weight_sum, Tensor) else weight_sum
    # 0 / 0 where every target of all ranks is ignored
    scale = torch.where(weights == 0, 0.0, weights / divisor)
    return mark_absent(targets, ignore_index), scale.contiguous()


def wide_logits(
    device: str, dtype: torch.dtype, logits_dtype: torch.dtype | None, training: bool, kernel: str
) -> bool:
    """Whether logits are kept wider than the inputs.

    On demand, without gradients, and where products are fp32 anyway.
    """
    if dtype.itemsize >= 4:
        return False
    return (
        logits_dtype == torch.float32
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
    """Return the chunks of one call.

    Args:
        hidden: [N, D].
        vocabulary: V.
        needs_weight: whether there is a matrix gradient.
        wide: whether logits are fp32.
        gradient: see `linear_cross_entropy`, as the following.
        workspace_bytes: budget.
        chunk_tokens: tokens per chunk instead.

    Raises:
        BudgetError: the budget holds no chunk.
        ValueError: no budget, no mode or no size.
    """
    if gradient not in get_args(Gradient):
        raise ValueError(f"gradient = {gradient!r} must be one of {', '.join(get_args(Gradient))}")
    for name, value in (("workspace_bytes", workspace_bytes), ("chunk_tokens", chunk_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value} must be at least 1")
    tokens, element = hidden.shape[0], hidden.element_size()
    result = None if not needs_weight else 4 if hidden.dtype == torch.float16 else element
    if chunk_tokens is not None:
        return fixed_chunks(tokens, chunk_tokens, result, gradient)
    return plan_chunks(
        tokens,
        hidden.shape[1],
        vocabulary,
        logits_bytes=4 if wide else element,
        gradient_bytes=result,
        budget=workspace_bytes or DEFAULT_BUDGET.get(hidden.device.type, DEFAULT_BUDGET["cpu"]),
        mode=gradient,
    )


def _from_statistics(call: _LossCall, s: Statistics, lse: Tensor) -> LossOutput:
    """Compute the loss by its definition, from differentiable statistics."""
    z_losses = call.scale * call.z_loss_coefficient * lse.square().unsqueeze(1)
    nats, smoothing = s.nats, call.label_smoothing
    if smoothing:
        assert s.total is not None
        uniform = (lse - s.total / call.weight.shape[0]).unsqueeze(1)
        nats = (1 - smoothing) * nats + smoothing * uniform
    losses = call.scale * nats + z_losses
    hits, per_target = s.hits.reshape(call.shape), s.nats.reshape(call.shape)
    if call.reduction == "none":
        z_loss = z_losses.reshape(call.shape).detach()
        return LossOutput(losses.reshape(call.shape), z_loss, per_target, lse, hits)
    return LossOutput(
        losses.sum(), z_losses.sum().detach(), per_target.detach(), lse.detach(), hits
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
    """Raise ValueError for arguments of `linear_cross_entropy` that do not fit."""
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
