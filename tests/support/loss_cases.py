"""Inputs of the vocabulary loss, its definition in fp64, and plain torch in the inputs' own precision beside it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

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


class Defined(NamedTuple):
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
) -> Defined:
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
    nats = torch.stack([F.cross_entropy(logits, t, reduction="none") for t in targets.T], 1)
    smooth = (1 - label_smoothing) * nats + label_smoothing * (lse - logits.mean(-1)).unsqueeze(1)
    weights = case.token_weights.view(targets.shape) * there
    losses = weights * (smooth + z_loss_coefficient * lse.square().unsqueeze(1)) / weight_sum
    hits = there & (logits.argmax(-1, keepdim=True) == targets)
    return Defined(
        losses.view(case.targets.shape),
        nats.view(case.targets.shape),
        lse,
        hits.view(case.targets.shape),
    )


def assert_as_exact(
    found: Tensor, exact: Tensor, plain: Tensor, factor: float, dtype: torch.dtype, what: str
) -> None:
    """The largest error is at most `factor` times that of torch in the same dtype, plus two roundings of the largest value.

    QuACK's rule (its tests/test_linear_cross_entropy.py), with an absolute term that follows the
    values: where there are few of them, torch's error may be 0 by luck.
    """
    assert found.shape == exact.shape, what
    if not exact.numel():
        return
    own, theirs = ((x.detach().double() - exact).abs().max().item() for x in (found, plain))
    bound = factor * theirs + 2 * torch.finfo(dtype).eps * exact.abs().max().item()
    assert own <= bound, f"{what}: error {own:.3g} above {bound:.3g}; torch's is {theirs:.3g}"
