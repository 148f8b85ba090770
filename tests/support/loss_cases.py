"""Test cases of the vocabulary loss: inputs, the definition in fp64, and the bound on errors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.cross_entropy import LossOutput

OPTIONS = ("z_loss_coefficient", "softcap", "label_smoothing", "weight_sum")


class Case(NamedTuple):
    """hidden [N, D], weight [V, D] and bias [V] or None, leaves.

    Targets and token_weights [N] or [N, K].
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    token_weights: Tensor

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def wide(self) -> Case:
        """The same numbers in fp64, leaves of their own."""
        leaves = [None if t is None else t.detach().double().requires_grad_() for t in self[:3]]
        return Case(*leaves, self.targets, self.token_weights.double())

    def moved(self, generator: torch.Generator) -> Case:
        """Inputs that differ by a thousandth of each, normally distributed; leaves of their own."""
        leaves = [
            None
            if t is None
            else t.detach() * (1 + 1e-3 * torch.randn(t.shape, generator=generator).to(t.device))
            for t in self[:3]
        ]
        leaves = [None if t is None else t.to(self.hidden.dtype).requires_grad_() for t in leaves]
        return Case(*leaves, self.targets, self.token_weights)


def make_case(
    n: int = 37,
    d: int = 8,
    v: int = 53,
    *,
    targets: int | None = None,
    bias: bool = False,
    peaked: bool = False,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    """Random inputs; a fifth of the targets is ignored, and a tenth of the others weighs nothing.

    targets: None for [N], else K. scale: of the logits' standard deviation. peaked: every second
    row's target is the entry that it resembles, by far.
    """
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, d, generator=g), torch.randn(v, d, generator=g) * scale / d**0.5
    t = torch.randint(0, v, (n,) if targets is None else (n, targets), generator=g)
    if peaked:
        first = t if targets is None else t[:, 0]
        hidden[::2] = 3 * d**0.5 * F.normalize(weight[first[::2]], dim=-1)
    t[torch.rand(t.shape, generator=g) < 0.2] = -100
    weights = torch.rand(t.shape, generator=g) + 0.1
    weights[torch.rand(t.shape, generator=g) < 0.1] = 0.0
    leaves = [hidden, weight, torch.randn(v, generator=g) if bias else None]
    return Case(
        *(None if x is None else x.to(device, dtype).requires_grad_() for x in leaves),
        t.to(device),
        weights.to(device),
    )


class Definition(NamedTuple):
    """losses: loss of each target, weighted and divided.

    nats, hits in the shape of targets; lse [N].
    """

    losses: Tensor
    nats: Tensor
    lse: Tensor
    hits: Tensor


def define(
    case: Case,
    *,
    z_loss_coefficient: float = 0.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    weight_sum: float = 1.0,
) -> Definition:
    """Through all logits at once.

    Products are made in the dtype of the case, all else in fp32 or wider.
    """
    logits = F.linear(case.hidden, case.weight, case.bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    targets = case.targets.unsqueeze(1) if case.targets.dim() == 1 else case.targets
    there = targets != -100
    lse = logits.logsumexp(-1)
    nats = torch.stack([_nats(logits, t) for t in targets.T], 1)
    smooth = (1 - label_smoothing) * nats + label_smoothing * (lse - logits.mean(-1)).unsqueeze(1)
    weights = case.token_weights.view(targets.shape) * there
    losses = weights * (smooth + z_loss_coefficient * lse.square().unsqueeze(1)) / weight_sum
    hits = there & (logits.argmax(-1, keepdim=True) == targets)
    return Definition(
        losses.view(case.targets.shape),
        nats.view(case.targets.shape),
        lse,
        hits.view(case.targets.shape),
    )


def _nats(logits: Tensor, target: Tensor) -> Tensor:
    """Return nats [N] of one target per row, 0 where it is ignored.

    In fp64, the definition that others are compared with, it is log(1 + others / target): there
    lse - z_t is 0 or 2e-16 for a probability of 1 - 1e-17, which the kernels distinguish from 1.
    """
    if logits.dtype != torch.float64:
        return F.cross_entropy(logits, target, reduction="none")
    column = target.clamp_min(0).unsqueeze(1)
    others = logits.scatter(1, column, -torch.inf).logsumexp(-1) - logits.gather(1, column).squeeze(
        1
    )
    return torch.where(target >= 0, torch.logaddexp(torch.zeros_like(others), others), 0.0)


def differentiate(
    case: Case, output: Definition | LossOutput, reduction: str, upstream: float
) -> dict[str, Tensor]:
    """Return loss, nats, lse and the gradients of the leaves, "dX", "dW" and "db".

    Args:
        case: the inputs of `output`.
        output: of `define`, or of `linear_cross_entropy`.
        reduction: "sum", or "none": then every token has another gradient from above, and some
            comes through nats and lse.
        upstream: gradient from above of the summed loss.
    """
    loss = output.losses if isinstance(output, Definition) else output.loss
    if reduction == "sum":
        loss = loss.sum()
        scalar = loss * upstream
    else:
        generator = torch.Generator().manual_seed(1)
        a, b = (torch.randn(loss.shape, generator=generator).to(loss.device) for _ in range(2))
        c = torch.randn(output.lse.shape, generator=generator).to(loss.device)
        scalar = (loss * a).sum() + (output.nats * b).sum() + (output.lse * c).sum()
    gradients = torch.autograd.grad(scalar, case.leaves())
    values = {"loss": loss, "nats": output.nats, "lse": output.lse}
    values = {name: value.detach() for name, value in values.items()}
    return values | dict(zip(("dX", "dW", "db"), gradients, strict=False))


def torch_errors(case: Case, reduction: str, upstream: float, **options: Any) -> dict[str, float]:
    """Return the largest error of plain torch in each result of `differentiate`, against fp64."""
    exact = differentiate_exactly(case, reduction, upstream, **options)
    plain = differentiate(case, define(case, **options), reduction, upstream)
    return {name: largest(plain[name].double() - exact[name]) for name in exact}


def differentiate_exactly(
    case: Case, reduction: str, upstream: float, **options: Any
) -> dict[str, Tensor]:
    wide = case.wide()
    return differentiate(wide, define(wide, **options), reduction, upstream)


def largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def bound_of(name: str, theirs: float, exact: Tensor, dtype: torch.dtype) -> float:
    """Return the error that QuACK's rule allows (its tests/test_linear_cross_entropy.py).

    3 times torch's error (2 for gradients), plus two roundings of the largest value.
    """
    factor = 2 if name in ("dX", "dW", "db") else 3
    return factor * theirs + 2 * torch.finfo(dtype).eps * largest(exact)


NEIGHBOURS = 16


def check_results(
    actual: dict[str, Tensor],
    case: Case,
    dtype: torch.dtype,
    *,
    reduction: str = "sum",
    upstream: float = 1.0,
    **options: Any,
) -> None:
    """Assert that the errors of `actual`, as `differentiate` gives it, are within `bound_of`.

    Torch's error is one draw of a random variable. It may be near 0 by luck, most easily where
    there are few values, and where a gradient is a small difference of large terms, whose rounding
    2 eps of the gradient itself does not cover. So where the rule fails torch's error is taken as
    the largest one over NEIGHBOURS problems beside this one (inputs moved by a thousandth: the same
    conditioning, other roundings). An implementation whose errors are larger than torch's all
    around still fails.
    """
    exact = differentiate_exactly(case, reduction, upstream, **options)
    theirs = torch_errors(case, reduction, upstream, **options)
    own = {name: largest(actual[name].double() - exact[name]) for name in exact}
    assert actual.keys() == exact.keys()
    assert all(actual[name].shape == exact[name].shape for name in exact)
    if any(own[name] > bound_of(name, theirs[name], exact[name], dtype) for name in exact):
        generator = torch.Generator().manual_seed(2)
        neighbours = [
            torch_errors(case.moved(generator), reduction, upstream, **options)
            for _ in range(NEIGHBOURS)
        ]
        theirs = {name: max(e[name] for e in (theirs, *neighbours)) for name in exact}
    for name, value in exact.items():
        bound = bound_of(name, theirs[name], value, dtype)
        assert own[name] <= bound, (
            f"{name}: error {own[name]:.3g} above {bound:.3g}; torch's is {theirs[name]:.3g}"
        )
