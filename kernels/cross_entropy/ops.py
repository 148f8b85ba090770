"""torch.library operators around `fused.run`, with shapes and derivatives for torch.compile.

`nextpt::linear_cross_entropy` gives the scalar loss; its gradients are made in the forward pass and
kept, and the backward pass multiplies them by the gradient from above. `nextpt::token_statistics`
gives differentiable nats and log-sum-exp per token; its backward pass computes the logits again (8
N D V FLOPs in all).

An operator's schema is read from its signature, which takes tensors, numbers and strings only: so
each spells out its tensors, the settings of a `Problem`, and `needs`. Their order must not change:
torch.compile's cache on disk holds calls of them, which a later version would make wrongly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from kernels.cross_entropy import fused
from kernels.cross_entropy.fused import Problem
from kernels.cross_entropy.half_sums import power_of_two_over
from kernels.cross_entropy.rows import Coefficients, Statistics, check_targets

OptionalGradients = tuple[Tensor | None, ...]


class SummedLoss(NamedTuple):
    """Result of `linear_cross_entropy`.

    Attributes:
        loss: scalar.
        z_loss: its second part.
        nats: [N, K].
        lse: [N].
        hits: [N, K].
        unit: factor of the gradients: 1 but in fp16, where weights divided by the number of tokens
            would vanish.
        d_hidden: gradient of unit x loss, empty where it is not needed, as the following.
        d_weight: [V, D].
        d_bias: [V].
    """

    loss: Tensor
    z_loss: Tensor
    nats: Tensor
    lse: Tensor
    hits: Tensor
    unit: Tensor
    d_hidden: Tensor
    d_weight: Tensor
    d_bias: Tensor


class TokenStatistics(NamedTuple):
    """Result of `token_statistics`; the first three are differentiable.

    Attributes:
        nats: [N, K].
        lse: [N].
        total: [N], sums of logits.
        hits: [N, K].
        peak: [N].
        log_sum: [N].
    """

    nats: Tensor
    lse: Tensor
    total: Tensor
    hits: Tensor
    peak: Tensor
    log_sum: Tensor


def _checked(p: Problem) -> Problem:
    # On a GPU the host would wait; there the nats of such a target are nan
    if p.targets.device.type == "cpu":
        check_targets(p.targets, p.weight.shape[0])
    return p


def _filled(gradients: fused.Gradients, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An operator returns tensors only: an empty one where there is no gradient."""
    hidden, weight, bias = (like.new_empty(0) if g is None else g for g in gradients)
    return hidden, weight, bias


@torch.library.custom_op("nextpt::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: Tensor,
    z_loss_coefficient: float,
    smoothing: float,
    softcap: float,
    rows: int,
    sums: str,
    wide: bool,
    kernel: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the fields of `SummedLoss`.

    scale [N, K]: token weight / weight_sum, 0 where there is no target. needs: which of the
    gradients of hidden, weight and bias are computed.
    """
    p = _checked(Problem(hidden, weight, bias, targets, softcap or None, rows, sums, wide, kernel))
    unit = torch.ones((), dtype=p.dtype, device=hidden.device)
    if hidden.dtype == torch.float16:  # a power of two that brings the largest weight to [0.5, 1)
        unit = power_of_two_over(scale.abs().max()) if scale.numel() else unit
    coefficients = (
        scalar_coefficients(scale * unit, z_loss_coefficient, smoothing, weight.shape[0])
        if any(needs)
        else None
    )
    statistics, gradients = fused.run(p, needs, coefficients, total=smoothing > 0)
    lse = statistics.peak + statistics.log_sum
    row_scale = scale.sum(1)
    z_loss = (
        z_loss_coefficient * (row_scale * lse.square()).sum()
        if z_loss_coefficient
        else torch.zeros_like(unit)
    )
    loss = (scale * statistics.nats).sum() + z_loss
    if smoothing:
        assert statistics.total is not None
        uniform = torch.where(row_scale != 0, lse - statistics.total / weight.shape[0], 0.0)
        loss = loss + smoothing * ((row_scale * uniform).sum() - (scale * statistics.nats).sum())
    return (loss, z_loss, statistics.nats, lse, statistics.hits, unit, *_filled(gradients, hidden))


def scalar_coefficients(
    scale: Tensor, z_loss_coefficient: float, smoothing: float, vocabulary: int
) -> Coefficients:
    """Return the coefficients of the gradient of the scalar loss, from scale [N, K]."""
    row = scale.sum(1)
    return Coefficients(
        scale * (1 - smoothing),
        row * smoothing if smoothing else None,
        row * z_loss_coefficient if z_loss_coefficient else None,
        row * (-smoothing / vocabulary) if smoothing else None,
    )


@linear_cross_entropy.register_fake
def _(hidden: Tensor, weight: Tensor, _: Tensor | None, targets: Tensor, *rest: Any) -> Any:
    needs: list[bool] = rest[-1]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    scalar = hidden.new_empty((), dtype=dtype)
    per_target = hidden.new_empty(targets.shape, dtype=dtype)
    shapes = (
        (hidden.shape, hidden.dtype),
        (weight.shape, fused.matrix_gradient_dtype(hidden, weight)),
        (weight.shape[:1], dtype),
    )
    gradients = [
        hidden.new_empty(s, dtype=d) if need else hidden.new_empty(0)
        for need, (s, d) in zip(needs, shapes, strict=True)
    ]
    return (
        scalar,
        torch.empty_like(scalar),
        per_target,
        hidden.new_empty(targets.shape[:1], dtype=dtype),
        hidden.new_empty(targets.shape, dtype=torch.bool),
        torch.empty_like(scalar),
        *gradients,
    )


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.needs, ctx.dtypes = inputs[-1], [None if t is None else t.dtype for t in inputs[:3]]
    ctx.save_for_backward(*output[5:])


def _give_gradients(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> OptionalGradients:
    others = [None] * 10
    if upstream is None:
        return (None, None, None, *others)
    if torch.is_grad_enabled():  # create_graph
        raise RuntimeError(
            "the summed loss has no second derivatives: its gradients are computed in the forward"
            " pass; implementation='reference' has them"
        )
    unit, *kept = ctx.saved_tensors
    gradients: list[Tensor | None] = []
    for gradient, need, dtype in zip(kept, ctx.needs, ctx.dtypes, strict=True):
        if not need:
            gradients.append(None)
        elif ctx.dtypes[0] == torch.float16:
            gradients.append((gradient.float() * (upstream / unit)).to(dtype))
        else:
            # Another dtype for a bias only, whose sum is fp32
            gradients.append(scaled(gradient, upstream).to(dtype))
    return (*gradients, *others)


linear_cross_entropy.register_autograd(_give_gradients, setup_context=_keep_gradients)


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Return gradient x factor, in the gradient's own memory.

    In new memory while something traces, where writing over the output of an operator is not
    allowed. A compiler reuses the memory by itself.
    """
    if is_in_torch_dispatch_mode():
        return gradient * factor.to(torch.promote_types(gradient.dtype, torch.float32))
    scale_(gradient, factor)
    return gradient


@torch.library.custom_op("nextpt::scale_", mutates_args=("gradient",))
def scale_(gradient: Tensor, factor: Tensor) -> None:
    """Multiply the gradient in place by a scalar on the same device.

    It costs a read of the scalar where that is 1, as in training.
    """
    if gradient.is_cuda:
        from kernels.cross_entropy.scale_triton import scale

        scale(gradient, factor)
    elif float(factor) != 1.0:
        gradient.mul_(factor.to(gradient.dtype) if gradient.element_size() >= 4 else factor)


@scale_.register_fake
def _(gradient: Tensor, factor: Tensor) -> None:
    return None


@torch.library.custom_op("nextpt::token_statistics", mutates_args=())
def token_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float,
    rows: int,
    sums: str,
    wide: bool,
    kernel: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the fields of `TokenStatistics`."""
    p = _checked(Problem(hidden, weight, bias, targets, softcap or None, rows, sums, wide, kernel))
    s, _ = fused.run(p, (False, False, False), None, total=True)
    assert s.total is not None
    return s.nats, s.peak + s.log_sum, s.total, s.hits, s.peak, s.log_sum


@token_statistics.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *_: Any) -> Any:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    nats = hidden.new_empty(targets.shape, dtype=dtype)
    row = hidden.new_empty(targets.shape[:1], dtype=dtype)
    return (
        nats,
        row,
        torch.empty_like(row),
        torch.empty_like(nats, dtype=torch.bool),
        torch.empty_like(row),
        torch.empty_like(row),
    )


@torch.library.custom_op("nextpt::token_statistics_backward", mutates_args=())
def token_statistics_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float,
    rows: int,
    sums: str,
    wide: bool,
    kernel: str,
    needs: list[bool],
    nats: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    d_nats: Tensor,
    d_lse: Tensor,
    d_total: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute gradients of hidden, weight and bias from those of nats, lse and total."""
    p = _checked(Problem(hidden, weight, bias, targets, softcap or None, rows, sums, wide, kernel))
    unused = torch.empty_like(targets, dtype=torch.bool)
    statistics = Statistics(nats, peak, log_sum, None, unused)
    unit = torch.ones((), dtype=p.dtype, device=hidden.device)
    if hidden.dtype == torch.float16:
        unit = (
            power_of_two_over(torch.stack([t.abs().max() for t in (d_nats, d_lse, d_total)]).max())
            if d_lse.numel()
            else unit
        )
    coefficients = Coefficients(
        torch.where(targets >= 0, d_nats * unit, 0.0), d_lse * unit, None, d_total * unit
    )
    gradients = _filled(fused.run(p, needs, coefficients, statistics)[1], hidden)
    inputs = (hidden, weight, hidden if bias is None else bias)
    d_hidden, d_weight, d_bias = (
        (g if hidden.dtype != torch.float16 else g.float() / unit).to(t.dtype)
        for g, t in zip(gradients, inputs, strict=True)
    )
    return d_hidden, d_weight, d_bias


@token_statistics_backward.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    needs: list[bool] = rest[6]  # behind the targets and the settings
    inputs = (hidden, weight, weight[:, 0] if bias is None else bias)
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if n else t.new_empty(0)
        for n, t in zip(needs, inputs, strict=True)
    )


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, *rest = inputs
    kept = TokenStatistics(*output)
    ctx.mark_non_differentiable(kept.hits, kept.peak, kept.log_sum)
    ctx.rest = rest
    ctx.save_for_backward(hidden, weight, bias, targets, kept.nats, kept.peak, kept.log_sum)


def _recompute(
    ctx: Any, d_nats: Tensor, d_lse: Tensor, d_total: Tensor, *_: Tensor | None
) -> OptionalGradients:
    hidden, weight, bias, targets, nats, peak, log_sum = ctx.saved_tensors
    needs: Sequence[bool] = ctx.rest[-1]
    gradients = token_statistics_backward(
        hidden, weight, bias, targets, *ctx.rest, nats, peak, log_sum, d_nats, d_lse, d_total
    )
    return (*(g if need else None for g, need in zip(gradients, needs, strict=True)), *[None] * 7)


token_statistics.register_autograd(_recompute, setup_context=_keep_inputs)
