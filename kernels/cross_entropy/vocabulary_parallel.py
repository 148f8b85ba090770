"""Vocabulary-parallel loss: each rank holds a slice of the vocabulary (arXiv 1909.08053 section 3).

Per chunk of tokens each rank describes its slice of the logits, one all-gather shares peak, log-sum
and the targets' nats, and every rank completes them alike, in the same order, so that all have the
same bits. The gradient of the hidden states is a sum over ranks: one all-reduce. Logits never
travel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.autocast import autocast
from kernels.choice import choose_cross_entropy
from kernels.cross_entropy import fused
from kernels.cross_entropy.chunking import Chunking, Gradient
from kernels.cross_entropy.fused import Problem
from kernels.cross_entropy.interface import (
    LossOutput,
    check,
    chunking,
    gradients_needed,
    prepare,
    wide_logits,
)
from kernels.cross_entropy.ops import scalar_coefficients, scaled
from kernels.cross_entropy.rows import NO_TARGET, Statistics, check_targets


def slice_of(vocabulary: int, rank: int, ranks: int) -> range:
    """Return the entries that a rank holds: equal slices, the last may be shorter or empty."""
    size = -(-vocabulary // ranks)
    return range(min(rank * size, vocabulary), min((rank + 1) * size, vocabulary))


def vocabulary_parallel_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocabulary: int,
    group: dist.ProcessGroup,
    token_weights: Tensor | None = None,
    weight_sum: Tensor | float | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    z_loss_coefficient: float = 0.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    gradient: Gradient = "precise",
    logits_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
    chunk_tokens: int | None = None,
    implementation: str = "auto",
) -> LossOutput:
    """Compute `linear_cross_entropy` with reduction="sum" for a vocabulary divided over ranks.

    bf16, fp32 and fp64. All results are the same on all ranks; the gradient of hidden is the whole
    one, that of the weight is the slice's.

    Args:
        hidden: [N, D], the same on all ranks, as targets and token weights are.
        weight: [V_r, D], the `slice_of` this rank.
        targets: int64 [N] or [N, K], entries of the whole vocabulary.
        vocabulary: V, entries of all ranks.
        group: ranks that share the vocabulary.
        token_weights: see `linear_cross_entropy`, as the following.
        weight_sum: divisor.
        bias: [V_r].
        ignore_index: target of tokens that have none.
        z_loss_coefficient: factor of lse^2.
        softcap: cap of the logits.
        label_smoothing: share of the mean over the vocabulary.
        gradient: how the matrix gradient is summed.
        logits_dtype: torch.float32 for wide logits.
        workspace_bytes: budget.
        chunk_tokens: tokens per chunk instead.
        implementation: name.

    Raises:
        ValueError: as `linear_cross_entropy`, and for a slice of another size.
    """
    hidden, weight = autocast(hidden, weight)
    bias = None if bias is None else autocast(bias)[0]
    check(hidden, weight, targets, token_weights, bias, softcap, label_smoothing, logits_dtype)
    mine = slice_of(vocabulary, dist.get_rank(group), dist.get_world_size(group))
    if weight.shape[0] != len(mine) or not len(mine):
        raise ValueError(
            f"rank {dist.get_rank(group)} of {dist.get_world_size(group)} holds entries"
            f" {mine.start} to {mine.stop} of {vocabulary}, at least one; got a weight of"
            f" {weight.shape[0]}"
        )
    if hidden.dtype == torch.float16:
        raise ValueError("vocabulary_parallel_cross_entropy takes bf16 or fp32, not fp16")
    kernel = choose_cross_entropy(implementation, hidden.device.type, hidden.dtype).name
    columns, scale = prepare(hidden, targets, token_weights, weight_sum, ignore_index, "sum")
    if not columns.is_cuda:
        check_targets(columns, vocabulary)
    training = any(gradients_needed(hidden, weight, bias))
    wide = wide_logits(hidden.device.type, hidden.dtype, logits_dtype, training, kernel)
    # Chunks by the largest slice: every rank must come to the same number of collectives.
    largest = len(slice_of(vocabulary, 0, dist.get_world_size(group)))
    memory = gradient, workspace_bytes, chunk_tokens
    plan = chunking(hidden, largest, weight.requires_grad, wide, *memory)
    settings = _Settings(
        z_loss_coefficient, label_smoothing, softcap, plan, wide, kernel, vocabulary, group
    )
    loss, z_loss, nats, lse, hits = _apply(hidden, weight, bias, columns, scale, settings)
    return LossOutput(loss, z_loss, nats.reshape(targets.shape), lse, hits.reshape(targets.shape))


class _Settings(NamedTuple):
    """Arguments of the loss that are no tensors."""

    z_loss_coefficient: float
    smoothing: float
    softcap: float | None
    plan: Chunking
    wide: bool
    kernel: str
    vocabulary: int
    group: dist.ProcessGroup


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: Tensor,
        s: _Settings,
    ) -> tuple[Tensor, ...]:
        ranks, rank = dist.get_world_size(s.group), dist.get_rank(s.group)
        mine = slice_of(s.vocabulary, rank, ranks)
        is_mine = (targets >= mine.start) & (targets < mine.stop)
        local = torch.where(is_mine, targets - mine.start, NO_TARGET)
        size = len(slice_of(s.vocabulary, 0, ranks))
        owner = torch.where(targets >= 0, targets // size, NO_TARGET)
        memory = s.plan.rows, s.plan.sums, s.wide, s.kernel
        p = Problem(hidden, weight, bias, local, s.softcap, *memory)
        needs = ctx.needs_input_grad[:3]

        def combine(part: slice, chunk: Statistics) -> None:
            _complete(chunk, owner[part], _gathered(chunk, s.group))

        coefficients = None
        if any(needs):
            coefficients = scalar_coefficients(
                scale, s.z_loss_coefficient, s.smoothing, s.vocabulary
            )
        statistics, gradients = fused.run(
            p, needs, coefficients, total=s.smoothing > 0, combine=combine
        )
        if gradients.hidden is not None:
            dist.all_reduce(gradients.hidden, group=s.group)
        lse, row = statistics.peak + statistics.log_sum, scale.sum(1)
        z_loss = s.z_loss_coefficient * (row * lse.square()).sum()
        loss = (scale * statistics.nats).sum() * (1 - s.smoothing) + z_loss
        if statistics.total is not None:
            uniform = row * (lse - statistics.total / s.vocabulary)
            loss = loss + s.smoothing * torch.where(row != 0, uniform, 0.0).sum()
        ctx.gradients = gradients
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(z_loss, statistics.nats, lse, statistics.hits)
        return loss, z_loss, statistics.nats, lse, statistics.hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "the gradients of this loss were given out; call it again for a second backward"
                " pass"
            )
        scaled_gradients = (
            None if g is None else scaled(g, upstream).to(d)
            for g, d in zip(gradients, ctx.dtypes, strict=True)
        )
        return (*scaled_gradients, None, None, None)


_apply: Callable[..., tuple[Tensor, ...]] = _Loss.apply


def _gathered(chunk: Statistics, group: dist.ProcessGroup) -> Tensor:
    """Gather peak, log_sum, total, nats and hits of every rank's slice, [ranks, n, C]."""
    total = torch.zeros_like(chunk.peak) if chunk.total is None else chunk.total
    packed = torch.cat(
        [
            torch.stack((chunk.peak, chunk.log_sum, total), 1),
            chunk.nats,
            chunk.hits.to(chunk.nats.dtype),
        ],
        1,
    )
    everyone = packed.new_empty(dist.get_world_size(group) * packed.shape[0], packed.shape[1])
    dist.all_gather_into_tensor(everyone, packed, group=group)
    return everyone.view(-1, *packed.shape)


def _complete(chunk: Statistics, owner: Tensor, everyone: Tensor) -> None:
    """Make the statistics of a slice those of whole rows, in place.

    Args:
        chunk: statistics of n rows.
        owner: [n, K], the rank that holds the target; -1 for none.
        everyone: of every rank's slice, from `_gathered`.
    """
    count = owner.shape[1]
    peaks, log_sums, totals = everyone[:, :, 0], everyone[:, :, 1], everyone[:, :, 2]
    peak = peaks.amax(0)
    log_sum = (peaks - peak + log_sums).exp().sum(0).log()
    held = owner.clamp_min(0)
    nats = everyone[:, :, 3 : 3 + count].gather(0, held.unsqueeze(0))[0]
    hits = everyone[:, :, 3 + count :].gather(0, held.unsqueeze(0))[0] > 0
    own_peak, own_sum = peaks.T.gather(1, held), log_sums.T.gather(1, held)
    # Everything but the target, over the target: within its slice e^nats - 1, in another slice
    # e^(lse - z_t).
    others = torch.expm1(nats)
    for rank in range(everyone.shape[0]):
        away = (
            (peaks[rank].unsqueeze(1) - own_peak) + (log_sums[rank].unsqueeze(1) - own_sum) + nats
        )
        elsewhere = held != rank
        others = others + torch.where(elsewhere, away.exp(), 0.0)
        hits = hits & (~elsewhere | (own_peak > peaks[rank].unsqueeze(1)))
    whole = torch.where(
        others < 1,
        torch.log1p(others),
        (peak.unsqueeze(1) - own_peak) + (log_sum.unsqueeze(1) - own_sum) + nats,
    )
    chunk.nats.copy_(torch.where(owner >= 0, whole, 0.0))
    chunk.hits.copy_(hits & (owner >= 0))
    chunk.peak.copy_(peak)
    chunk.log_sum.copy_(log_sum)
    if chunk.total is not None:
        chunk.total.copy_(totals.sum(0))
