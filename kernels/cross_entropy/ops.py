"""torch.library operators around `fused.run`: opaque to torch.compile, with shapes and derivatives registered.

`nextpt::linear_cross_entropy` gives the scalar loss; its gradients are made in the forward pass and
kept, and the backward pass multiplies them by the gradient from above. `nextpt::token_statistics`
gives differentiable nats and log-sum-exp per token; its backward pass computes the logits again (8
N D V FLOPs in all).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from kernels.cross_entropy import fused
from kernels.cross_entropy.fused import Problem
from kernels.cross_entropy.half_sums import power_of_two_over
from kernels.cross_entropy.rows import Coefficients, Statistics, check_targets

_NO_CAP = 0.0


def _problem(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float,
    rows: int,
    sums: str,
    wide: bool,
    kernel: str,
) -> Problem:
    # On a GPU the host would wait; there the nats of such a target are nan
    if targets.device.type == "cpu":
        check_targets(targets, weight.shape[0])
    return Problem(
        hidden,
        weight,
        bias,
        targets,
        None if softcap == _NO_CAP else softcap,
        rows,
        sums,
        wide,
        kernel,
    )


def _filled(gradients: fused.Gradients, like: Tensor) -> list[Tensor]:
    """An operator returns tensors only: an empty one where there is no gradient."""
    return [like.new_empty(0) if g is None else g for g in gradients]


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
    """(loss, z_loss, nats [N, K], lse [N], hits [N, K], unit, dX, dW, db).

    scale [N, K]: token weight / weight_sum, 0 where there is no target. needs: which of dX, dW, db
    are made. They are of `unit` x loss: 1 but in fp16, where weights divided by the number of
    tokens would vanish.
    """
    p = _problem(hidden, weight, bias, targets, softcap, rows, sums, wide, kernel)
    unit = torch.ones((), dtype=p.dtype, device=hidden.device)
    if hidden.dtype == torch.float16:  # a power of two that brings the largest weight to [0.5, 1)
        unit = power_of_two_over(scale.abs().max()) if scale.numel() else unit
    coefficients = (
        scalar_coefficients(scale * unit, z_loss_coefficient, smoothing, weight.shape[0])
        if any(needs)
        else None
    )
    statistics, gradients = fused.run(p, tuple(needs), coefficients, total=smoothing > 0)
    lse = statistics.peak + statistics.log_sum
    row_scale = scale.sum(1)
    z_loss = (
        z_loss_coefficient * (row_scale * lse.square()).sum()
        if z_loss_coefficient
        else torch.zeros_like(unit)
    )
    loss = (scale * statistics.nats).sum() + z_loss
    if smoothing:
        uniform = torch.where(row_scale != 0, lse - statistics.total / weight.shape[0], 0.0)
        loss = loss + smoothing * ((row_scale * uniform).sum() - (scale * statistics.nats).sum())
    return (loss, z_loss, statistics.nats, lse, statistics.hits, unit, *_filled(gradients, hidden))


def scalar_coefficients(
    scale: Tensor, z_loss_coefficient: float, smoothing: float, vocabulary: int
) -> Coefficients:
    """What the gradient of the scalar loss consists of, from scale [N, K]."""
    row = scale.sum(1)
    return Coefficients(
        scale * (1 - smoothing),
        row * smoothing if smoothing else None,
        row * z_loss_coefficient if z_loss_coefficient else None,
        row * (-smoothing / vocabulary) if smoothing else None,
    )


@linear_cross_entropy.register_fake
def _(
    hidden,
    weight,
    bias,
    targets,
    scale,
    z_loss_coefficient,
    smoothing,
    softcap,
    rows,
    sums,
    wide,
    kernel,
    needs,
):
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    scalar = hidden.new_empty((), dtype=dtype)
    per_target = hidden.new_empty(targets.shape, dtype=dtype)
    p = Problem(hidden, weight, bias, targets, None, rows, sums, wide, kernel)
    shapes = (
        (hidden.shape, hidden.dtype),
        (weight.shape, p.gradient_dtype()),
        (weight.shape[:1], dtype),
    )
    made = [
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
        *made,
    )


def _keep_gradients(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.needs, ctx.dtypes = inputs[-1], [None if t is None else t.dtype for t in inputs[:3]]
    ctx.save_for_backward(*output[5:])


def _give_gradients(ctx, upstream, *_):
    nothing = [None] * 10
    if upstream is None:
        return (None, None, None, *nothing)
    unit, *made = ctx.saved_tensors
    given = []
    for gradient, need, dtype in zip(made, ctx.needs, ctx.dtypes, strict=True):
        if not need:
            gradient = None
        elif ctx.dtypes[0] == torch.float16:
            gradient = (gradient.float() * (upstream / unit)).to(dtype)
        else:
            # Another dtype for a bias only, whose sum is fp32
            gradient = scaled(gradient, upstream).to(dtype)
        given.append(gradient)
    return (*given, *nothing)


linear_cross_entropy.register_autograd(_give_gradients, setup_context=_keep_gradients)


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Gradient x factor in gradient's own memory.

    In new memory while something traces, where writing over the output of an operator would be a
    mistake. A compiler reuses the memory by itself.
    """
    if is_in_torch_dispatch_mode():
        return gradient * factor.to(torch.promote_types(gradient.dtype, torch.float32))
    scale_(gradient, factor)
    return gradient


@torch.library.custom_op("nextpt::scale_", mutates_args=("gradient",))
def scale_(gradient: Tensor, factor: Tensor) -> None:
    """Gradient *= factor, a scalar on the same device.

    Costs a read of the scalar where that is 1, as in training.
    """
    if gradient.is_cuda:
        from kernels.cross_entropy.scale_triton import scale

        scale(gradient, factor)
    elif float(factor) != 1.0:
        gradient.mul_(factor.to(gradient.dtype) if gradient.element_size() >= 4 else factor)


@scale_.register_fake
def _(gradient, factor):
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
    """(nats [N, K], lse [N], total [N]: sum of logits, hits [N, K], peak [N], log_sum [N]).

    The first three are differentiable.
    """
    p = _problem(hidden, weight, bias, targets, softcap, rows, sums, wide, kernel)
    s, _ = fused.run(p, (False, False, False), None, total=True)
    return s.nats, s.peak + s.log_sum, s.total, s.hits, s.peak, s.log_sum


@token_statistics.register_fake
def _(hidden, weight, bias, targets, softcap, rows, sums, wide, kernel, needs):
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
    """(dX, dW, db) in the dtypes of the inputs, from the gradients of nats [N, K], lse [N] and total [N]."""
    p = _problem(hidden, weight, bias, targets, softcap, rows, sums, wide, kernel)
    unused = torch.empty_like(targets, dtype=torch.bool)
    statistics = Statistics(nats, peak, log_sum, None, unused)
    unit = torch.ones((), dtype=p.dtype, device=hidden.device)
    if hidden.dtype == torch.float16:
        unit = (
            power_of_two_over(torch.stack([t.abs().max() for t in (d_nats, d_lse, d_total)]).max())
            if d_lse.numel()
            else unit
        )
    wanted = Coefficients(
        torch.where(targets >= 0, d_nats * unit, 0.0), d_lse * unit, None, d_total * unit
    )
    made = _filled(fused.run(p, tuple(needs), wanted, statistics)[1], hidden)
    inputs = (hidden, weight, hidden if bias is None else bias)
    return tuple(
        (g if hidden.dtype != torch.float16 else g.float() / unit).to(t.dtype)
        for g, t in zip(made, inputs, strict=True)
    )


@token_statistics_backward.register_fake
def _(hidden, weight, bias, targets, softcap, rows, sums, wide, kernel, needs, *_):
    inputs = (hidden, weight, weight[:, 0] if bias is None else bias)
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if n else t.new_empty(0)
        for n, t in zip(needs, inputs, strict=True)
    )


def _keep_inputs(ctx, inputs, output) -> None:
    hidden, weight, bias, targets, *rest = inputs
    nats, _, _, hits, peak, log_sum = output
    ctx.mark_non_differentiable(hits, peak, log_sum)
    ctx.rest = rest
    ctx.save_for_backward(hidden, weight, bias, targets, nats, peak, log_sum)


def _recompute(ctx, d_nats, d_lse, d_total, *_):
    hidden, weight, bias, targets, nats, peak, log_sum = ctx.saved_tensors
    needs = ctx.rest[-1]
    made = token_statistics_backward(
        hidden, weight, bias, targets, *ctx.rest, nats, peak, log_sum, d_nats, d_lse, d_total
    )
    return (*(g if need else None for g, need in zip(made, needs, strict=True)), *[None] * 7)


token_statistics.register_autograd(_recompute, setup_context=_keep_inputs)
