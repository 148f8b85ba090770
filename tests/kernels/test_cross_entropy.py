"""The fused loss against fp64 autograd through all logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kernels.cross_entropy import linear_cross_entropy


def case(n=37, d=8, v=53, scale=1.0, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(n, d, generator=g) * scale).to(dtype).requires_grad_()
    weight = torch.randn(v, d, generator=g).to(dtype).requires_grad_()
    targets = torch.randint(0, v, (n,), generator=g)
    targets[torch.rand(n, generator=g) < 0.2] = -100
    return hidden, weight, targets, torch.rand(n, generator=g)


def definition(hidden, weight, targets, weights, normalizer, z=0.0, cap=None, bias=None):
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    if cap:
        logits = cap * torch.tanh(logits / cap)
    nats = F.cross_entropy(logits, targets, reduction="none")
    valid = weights.double() * (targets != -100)
    return (valid * (nats + z * logits.logsumexp(-1).square())).sum() / normalizer, nats


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), v=st.integers(2, 70), chunk=st.integers(1, 41), z=st.sampled_from([0.0, 1e-2]),
       cap=st.sampled_from([None, 5.0]), biased=st.booleans(), seed=st.integers(0, 99))
def test_loss_and_gradients(n: int, v: int, chunk: int, z: float, cap: float | None, biased: bool, seed: int) -> None:
    hidden, weight, targets, weights = case(n, 8, v, seed=seed)
    bias = torch.linspace(-1, 1, v).requires_grad_() if biased else None
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    want, nats = definition(hidden, weight, targets, weights, 3.0, z, cap, bias)
    want_gradients = torch.autograd.grad(want * 0.7, leaves)
    for name in ("reference", "torch"):
        out = linear_cross_entropy(hidden, weight, targets, token_weights=weights, normalizer=3.0, z_loss=z, softcap=cap,
                                   bias=bias, chunk_tokens=chunk, implementation=name)
        assert out.loss.dtype == out.nats.dtype == torch.float32
        torch.testing.assert_close(out.loss.double(), want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.nats.double(), nats, atol=1e-5, rtol=1e-5)
        for got, expected in zip(torch.autograd.grad(out.loss * 0.7, leaves), want_gradients, strict=True):
            torch.testing.assert_close(got, expected.to(got.dtype), atol=1e-5, rtol=1e-4)


def test_all_ignored_is_zero_and_finite() -> None:
    hidden, weight, targets, _ = case()
    out = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    gradients = torch.autograd.grad(out.loss, (hidden, weight))
    assert out.loss == 0 and out.nats.eq(0).all() and not out.hits.any()
    assert all(g.eq(0).all() for g in gradients)


@pytest.mark.parametrize("scale", [40.0, 160.0])
def test_large_logits_stay_accurate(scale: float) -> None:
    hidden, weight, targets, weights = case(scale=scale)
    want, _ = definition(hidden, weight, targets, weights, 1.0)
    out = linear_cross_entropy(hidden, weight, targets, token_weights=weights, normalizer=1.0)
    torch.testing.assert_close(out.loss.double(), want, rtol=1e-5, atol=0)


def test_confident_targets_keep_their_gradient() -> None:
    hidden = torch.tensor([[7.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]])
    (got,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, torch.tensor([0])).loss, hidden)
    wide = hidden.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(definition(wide, weight, torch.tensor([0]), torch.ones(1), 1.0)[0], wide)
    torch.testing.assert_close(got.double(), want, rtol=2e-4, atol=0)


def test_frozen_sides_no_grad_and_hits() -> None:
    hidden, weight, targets, _ = case()
    both = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets).loss, (hidden, weight))
    for frozen in (0, 1):
        pair = [hidden, weight]
        pair[frozen] = pair[frozen].detach()
        (got,) = torch.autograd.grad(linear_cross_entropy(*pair, targets).loss, pair[1 - frozen])
        assert torch.equal(got, both[1 - frozen])
    with torch.no_grad():
        out = linear_cross_entropy(hidden, weight, targets)
    assert not out.loss.requires_grad
    assert torch.equal(out.hits, ((hidden @ weight.T).argmax(-1) == targets))


def test_bf16_is_close_and_its_loss_is_fp32() -> None:
    hidden, weight, targets, weights = case(n=200, dtype=torch.bfloat16)
    want, _ = definition(hidden, weight, targets, weights, 10.0)
    out = linear_cross_entropy(hidden, weight, targets, token_weights=weights, normalizer=10.0, chunk_tokens=64)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss.double(), want, rtol=5e-3, atol=0)
    (got,) = torch.autograd.grad(out.loss, weight)
    (expected,) = torch.autograd.grad(want, weight)
    assert (got.double() - expected.double()).norm() < 0.01 * expected.double().norm()


def test_chunking_is_a_function_of_shapes() -> None:
    from kernels.cross_entropy.chunked import rows_per_chunk

    assert rows_per_chunk(4096, 4096, "cpu") * 4 * 4096 <= 2**26
    assert rows_per_chunk(10, 262144, "cpu") == 10
    assert rows_per_chunk(0, 100, "cpu") == 1


@pytest.mark.parametrize(("shapes", "match"), [
    (((4, 8), (5, 7), (4,)), "do not fit"), (((4, 8), (5, 8), (3,)), "targets must be"),
])
def test_shapes_are_checked(shapes: tuple, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        linear_cross_entropy(torch.zeros(shapes[0]), torch.zeros(shapes[1]), torch.zeros(shapes[2], dtype=torch.long))
