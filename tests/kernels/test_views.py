"""Arguments that are views: every operator gives what it gives for contiguous copies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.attention import PackedDocuments, attention
from kernels.attention import ops as attention_ops
from kernels.attention.intervals import Intervals, Slices, causal
from kernels.cross_entropy import linear_cross_entropy, scale_triton
from tests.kernels.test_attention_triton import gpu, qkv, tiles
from tests.support.loss_cases import make_case

DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]
pytestmark = [
    pytest.mark.thorough,
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning:triton.*"),
    pytest.mark.parametrize("device", DEVICES),
]
LAYOUTS = st.sampled_from(["same", "every second", "transposed", "expanded", "shifted"])
POISON = {torch.int64: 10**9, torch.int32: 10**9, torch.bool: True}


def lay_out(t: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """(a view that is laid out so, a contiguous copy of it); what lies between is poison."""
    poison = torch.full_like(t, POISON.get(t.dtype, float("nan")), dtype=t.dtype)
    if layout == "every second":
        view = torch.stack((t, poison), -1).flatten(-2)[..., ::2] if t.dim() else t
    elif layout == "transposed" and t.dim() > 1:
        view = t.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "expanded" and t.numel():
        view = t[..., :1].expand(t.shape)
    elif layout == "shifted":
        view = torch.cat((poison, t))[t.shape[0] :]
    else:
        view = t
    return view, view.clone(memory_format=torch.contiguous_format)


def assert_same(results: list[list[Tensor]]) -> None:
    """BLAS sums the products of other layouts in another order."""
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_of_the_loss(device: str, data: st.DataObject) -> None:
    draw = data.draw
    case = make_case(5, 4, 40, targets=draw(st.sampled_from([None, 2])), bias=True, device=device)
    reduction = draw(st.sampled_from(["sum", "none"]), "reduction")
    names = ("hidden", "weight", "bias", "targets", "token_weights", "above")
    above = torch.randn(case.targets.shape, generator=torch.Generator().manual_seed(1)).to(device)
    tensors = [t.detach() for t in (*case[:5], above)]  # type: ignore[union-attr]
    pairs = [lay_out(t, draw(LAYOUTS, n)) for n, t in zip(names, tensors, strict=True)]
    results = []
    for chosen in zip(*pairs, strict=True):
        *leaves, targets, weights, gradient = chosen
        leaves = [t.detach().requires_grad_() for t in leaves]
        out = linear_cross_entropy(
            *leaves[:2],
            targets,
            bias=leaves[2],
            token_weights=weights,
            reduction=reduction,
            softcap=3.0,
            label_smoothing=0.1,
            z_loss_coefficient=0.1,
            chunk_tokens=3,
            implementation="triton",
        )
        upstream = gradient if reduction == "none" else None
        gradients = torch.autograd.grad(out.loss, leaves, upstream)
        results.append([out.loss, out.nats, out.lse, out.hits, *gradients])
    assert_same(results)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_of_attention(device: str, data: st.DataObject) -> None:
    draw, generator = data.draw, torch.Generator().manual_seed(1)
    sinks = torch.randn(4, generator=generator).to(device)
    above = torch.randn(2, 20, 4, 16, generator=generator).to(device)
    through_lse = torch.randn(2, 4, 20, generator=generator).to(device)
    ids = (torch.arange(20).expand(2, -1) // 7).to(device)
    names = ("q", "k", "v", "sinks", "above", "through lse", "ids")
    tensors = [*qkv(2, 20, 20, 4, 2, 16, 16, torch.float32, device), sinks, above, through_lse]
    pairs = [lay_out(t, draw(LAYOUTS, n)) for n, t in zip(names, [*tensors, ids], strict=True)]
    results = []
    for chosen in zip(*pairs, strict=True):
        leaves = [t.detach().requires_grad_() for t in chosen[:4]]
        with tiles(16, 16):
            out = attention(
                *leaves[:3],
                sinks=leaves[3],
                documents=PackedDocuments(chosen[6]),
                return_lse=True,
                implementation="triton",
            )
            assert out.lse is not None
            gradients = torch.autograd.grad(out, leaves, chosen[4:6])
        results.append([*out, *gradients])
    assert_same(results)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_of_the_operators_of_attention(device: str, data: st.DataObject) -> None:
    """What `attention` itself makes is laid out otherwise, as a compiler may do."""
    inputs = qkv(2, 20, 20, 4, 2, 16, 16, torch.float32, device)
    intervals = causal(Slices.of(20, 20), 7, torch.device(device))
    intervals = Intervals(*(t.expand(2, -1).contiguous() for t in intervals))
    with tiles(16, 16):
        kept = attention_ops.attention(*inputs, None, *intervals, 0.25, 0.0)
        operands = [*intervals, *kept]
        layouts = st.sampled_from(["same", "every second", "transposed", "shifted"])
        pairs = [lay_out(t, data.draw(layouts, str(n))) for n, t in enumerate(operands)]
        results = []
        for chosen in zip(*pairs, strict=True):
            ends, (out, lse, peak, log_sum) = chosen[:4], chosen[4:]
            forward = attention_ops.attention(*inputs, None, *ends, 0.25, 0.0)
            backward = attention_ops.attention_backward(
                *inputs, None, *ends, 0.25, 0.0, out, peak, log_sum, torch.ones_like(out), lse
            )
            results.append([*forward, *backward])
    assert_same(results)


def test_scaling_refuses_what_it_would_overrun(device: str) -> None:
    values, factor = torch.ones(8, device=device), torch.tensor(0.5, device=device)
    for view in (values[::2], values[:1].expand(8), values.view(2, 4).T):
        with pytest.raises(ValueError, match="contiguous"):
            scale_triton.scale(view, factor)
    scale_triton.scale(values, factor)
    assert values.eq(0.5).all()
