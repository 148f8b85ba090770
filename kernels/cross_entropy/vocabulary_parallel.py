"""The loss where each rank holds a slice of the vocabulary (arXiv 1909.08053 section 3).

Per chunk of tokens each rank describes its slice of the logits, one all-gather shares peak, log-sum
and the targets' nats, and every rank completes them alike, in the same order, so that all have the
same bits. The gradient of the hidden states is a sum over ranks: one all-reduce. Logits never
travel.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.autocast import autocast
from kernels.cross_entropy import fused
from kernels.cross_entropy.chunking import Gradient
from kernels.cross_entropy.fused import Problem
from kernels.cross_entropy.interface import LossOutput, check, chunking, pick, prepare, wide_logits
from kernels.cross_entropy.ops import scalar_coefficients, scaled
from kernels.cross_entropy.rows import NO_TARGET, Statistics, check_targets


def slice_of(vocabulary: int, rank: int, ranks: int) -> range:
    """The entries that a rank holds: equal slices, the last ones may be shorter or empty."""
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
    """As linear_cross_entropy with reduction="sum", for a weight [V_r, D] (and bias) that is this rank's `slice_of`.

    hidden, targets and weights are the same on all ranks of the group; targets are entries of the
    whole vocabulary. All results are the same on all ranks; the gradient of hidden is the whole
    one, that of weight is the slice's. bf16, fp32 and fp64. Raises ValueError as
    linear_cross_entropy, and for a slice of another size.
    """
    hidden, weight, bias = autocast(hidden, weight, bias)
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
    kernel = pick(implementation, hidden.device.type).name
    shape = targets.shape
    targets, scale = prepare(hidden, targets, token_weights, weight_sum, ignore_index, "sum")
    if not targets.is_cuda:
        check_targets(targets, vocabulary)
    training = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden, weight, bias)
    )
    wide = wide_logits(hidden.device.type, hidden.dtype, logits_dtype, training, kernel)
    # Chunks by the largest slice: every rank must come to the same number of collectives.
    largest = len(slice_of(vocabulary, 0, dist.get_world_size(group)))
    plan = chunking(
        hidden, largest, weight.requires_grad, wide, gradient, workspace_bytes, chunk_tokens
    )
    loss, z_loss, nats, lse, hits = _Loss.apply(
        hidden,
        weight,
        bias,
        targets,
        scale,
        z_loss_coefficient,
        label_smoothing,
        softcap,
        plan,
        wide,
        kernel,
        vocabulary,
        group,
    )
    return LossOutput(loss, z_loss, nats.reshape(shape), lse, hits.reshape(shape))


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        targets,
        scale,
        z_loss_coefficient,
        smoothing,
        softcap,
        plan,
        wide,
        kernel,
        vocabulary,
        group,
    ):
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        mine = slice_of(vocabulary, rank, ranks)
        local = torch.where(
            (targets >= mine.start) & (targets < mine.stop), targets - mine.start, NO_TARGET
        )
        owner = torch.where(targets >= 0, targets // len(slice_of(vocabulary, 0, ranks)), NO_TARGET)
        p = Problem(hidden, weight, bias, local, softcap, plan.rows, plan.sums, wide, kernel)
        needs = tuple(ctx.needs_input_grad[:3])

        def combine(part: slice, here: Statistics) -> None:
            _complete(here, owner[part], _gathered(here, group))

        coefficients = scalar_coefficients(scale, z_loss_coefficient, smoothing, vocabulary)
        statistics, gradients = fused.run(
            p, needs, coefficients if any(needs) else None, total=smoothing > 0, combine=combine
        )
        if gradients.hidden is not None:
            dist.all_reduce(gradients.hidden, group=group)
        lse, row = statistics.peak + statistics.log_sum, scale.sum(1)
        z_loss = z_loss_coefficient * (row * lse.square()).sum()
        loss = (scale * statistics.nats).sum() * (1 - smoothing) + z_loss
        if smoothing:
            loss = (
                loss
                + smoothing
                * torch.where(row != 0, row * (lse - statistics.total / vocabulary), 0.0).sum()
            )
        ctx.gradients = gradients
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(z_loss, statistics.nats, lse, statistics.hits)
        return loss, z_loss, statistics.nats, lse, statistics.hits

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "the gradients of this loss were given out; call it again for a second backward"
                " pass"
            )
        return (
            *(
                None if g is None else scaled(g, upstream).to(d)
                for g, d in zip(gradients, ctx.dtypes, strict=True)
            ),
            *[None] * 10,
        )


def _gathered(here: Statistics, group: dist.ProcessGroup) -> Tensor:
    """[ranks, n, C]: peak, log_sum, total, nats and hits of every rank's slice."""
    total = torch.zeros_like(here.peak) if here.total is None else here.total
    packed = torch.cat(
        [
            torch.stack((here.peak, here.log_sum, total), 1),
            here.nats,
            here.hits.to(here.nats.dtype),
        ],
        1,
    )
    everyone = packed.new_empty(dist.get_world_size(group) * packed.shape[0], packed.shape[1])
    dist.all_gather_into_tensor(everyone, packed, group=group)
    return everyone.view(-1, *packed.shape)


def _complete(here: Statistics, owner: Tensor, everyone: Tensor) -> None:
    """Fill `here` with the statistics of whole rows. owner [n, K]: the rank that holds the target, -1 for none."""
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
    here.nats.copy_(torch.where(owner >= 0, whole, 0.0))
    here.hits.copy_(hits & (owner >= 0))
    here.peak.copy_(peak)
    here.log_sum.copy_(log_sum)
    if here.total is not None:
        here.total.copy_(totals.sum(0))
