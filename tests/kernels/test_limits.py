"""Kernels at the edge: large scores, nothing to see, many rows, types and devices they lack."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels.attention import attention, intervals, launch, triton_attention
from kernels.attention.intervals import Slices, cached_causal
from kernels.cross_entropy import linear_cross_entropy, rows_triton
from tests.kernels.test_attention_triton import qkv, tiles

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning:triton.*"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, not interpreted"),
]
CPU = torch.device("cpu")


def test_probabilities_keep_their_digits_at_scores_of_a_thousand() -> None:
    """Scores that fp32 represents: only what is done to them can lose digits."""
    generator = torch.Generator().manual_seed(0)
    q, v = torch.ones(1, 24, 1, 16), torch.randn(1, 24, 1, 16, generator=generator)
    k = torch.zeros(1, 24, 1, 16)
    k[..., 0] = 1000 + torch.randint(0, 8, (1, 24, 1), generator=generator) / 8
    above = torch.randn(1, 24, 1, 16, generator=generator)
    gradients = []
    for dtype, implementation in ((torch.float64, "reference"), (torch.float32, "triton")):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        with tiles(16, 16):
            out = attention(*leaves, scale=1.0, implementation=implementation)
        gradients.append(torch.autograd.grad(out, leaves[2], above.to(dtype))[0])
    assert (gradients[1].double() - gradients[0]).abs().max() < 2e-6


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_nothing_is_seen_and_the_sink_is_closed(implementation: str) -> None:
    inputs = [t.requires_grad_() for t in qkv(1, 5, 3, 2, 1, 16, 16, torch.float32, "cpu")]
    sinks = torch.tensor([-torch.inf, 0.5], requires_grad=True)
    with tiles(16, 16):
        out, lse = attention(*inputs, sinks=sinks, return_lse=True, implementation=implementation)
    assert lse is not None and lse[0, 0, :2].eq(-torch.inf).all() and lse[0, 1].isfinite().all()
    assert out[0, :2].eq(0).all() and out.isfinite().all()
    gradients = torch.autograd.grad(out.square().sum(), [*inputs, sinks])
    assert all(g.isfinite().all() for g in gradients) and gradients[3][0] == 0


@pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
@pytest.mark.parametrize("weight_sum", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_a_loss_of_nothing_is_0(implementation: str, weight_sum: Any) -> None:
    hidden, weight = torch.randn(3, 4).requires_grad_(), torch.randn(9, 4).requires_grad_()
    out = linear_cross_entropy(
        *(hidden, weight, torch.full((3,), -100)),
        weight_sum=weight_sum,
        z_loss_coefficient=0.1,
        label_smoothing=0.1,
        implementation=implementation,
    )
    gradients = torch.autograd.grad(out.loss, (hidden, weight))
    assert out.loss == out.z_loss == 0 and all(g.eq(0).all() for g in gradients)


def test_a_penalty_on_gradients_of_the_summed_loss_is_refused() -> None:
    hidden, weight = torch.randn(3, 4).requires_grad_(), torch.randn(9, 4).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 3])).loss
    with pytest.raises(RuntimeError, match="implementation='reference' has them"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    loss = linear_cross_entropy(
        hidden, weight, torch.tensor([1, 2, 3]), implementation="reference"
    ).loss
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    gradient.square().sum().backward()
    assert weight.grad is not None and weight.grad.ne(0).any()


def test_the_interpreter_has_no_bf16() -> None:
    q = torch.randn(1, 3, 1, 16).bfloat16()
    with pytest.raises(ValueError, match="computes in bf16 wrongly"):
        attention(q, q, q, implementation="triton")
    hidden = torch.randn(3, 4).bfloat16()
    with pytest.raises(ValueError, match="computes in bf16 wrongly"):
        linear_cross_entropy(hidden, hidden, torch.tensor([0, 1, 2]), implementation="triton")


class Launches:
    """Stands for a kernel, and records its grids."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return lambda *_, **__: None


def test_grids_have_no_axis_that_ends_at_65535() -> None:
    q = torch.zeros(1, 1, 1, 16).expand(70_000, 3, 2, 16)
    ends = cached_causal(Slices.of(3, 3), None, CPU)
    inputs = launch.Inputs(q, q, q, None, ends, 1.0, 0.0)
    names = ("forward_kernel", "delta_kernel", "keys_kernel", "queries_kernel")
    kernels = {name: Launches() for name in names}
    with mock.patch.multiple(launch, **kernels):
        out, statistics = launch.forward(inputs)
        launch.backward(inputs, out, statistics.peak, statistics.log_sum, out, None)
    assert {name: kernel.grids for name, kernel in kernels.items()} == {
        name: [(140_000,)] for name in names
    }


def test_a_block_has_at_most_1024_threads() -> None:
    blocks = [2**n for n in range(6, 15)]
    for amd, threads in ((False, 32), (True, 64)):
        options = [rows_triton.compiler_options(b, amd) for b in blocks]
        assert max(o["num_warps"] for o in options) * threads == 1024
        assert ("maxnreg" in options[0]) != amd


def test_devices_of_amd_have_tiles_of_their_own() -> None:
    """Their compute capability is the first number of an architecture, as 9 of gfx942."""
    with mock.patch("torch.version.hip", "6.4"):
        assert launch.tiles_of(torch.device("cuda")) is launch.AMD


def test_the_self_test_is_outside_of_compiled_graphs() -> None:
    """It runs once, and what it says holds for graphs that are compiled before any call."""
    torch._dynamo.reset()
    q = torch.randn(1, 8, 1, 16)
    compiled = torch.compile(
        lambda x: attention(x, x, x, implementation="triton"), fullgraph=True, backend="eager"
    )
    with (
        mock.patch.dict(triton_attention._failures, clear=True),
        mock.patch.object(triton_attention, "_current_gpu", return_value=0),
        mock.patch.object(triton_attention, "difference", return_value=None) as difference,
    ):
        torch.testing.assert_close(compiled(q), attention(q, q, q, implementation="reference"))
        attention(q, q, q, implementation="triton")
        assert difference.call_count == 1


def test_intervals_of_plain_attention_are_computed_once() -> None:
    slices = Slices.of(6, 6)
    with mock.patch.object(intervals, "causal", wraps=intervals.causal) as computed:
        intervals._cached_causal.cache_clear()
        with torch.inference_mode():
            kept = cached_causal(slices, 3, CPU)
        assert cached_causal(slices, 3, CPU) is kept and computed.call_count == 1
        assert not kept.first.is_inference()
        with FlopCounterMode(display=False):  # a mode, as that of fake tensors
            assert cached_causal(slices, 3, CPU) is not kept
    assert torch.equal(kept.first, torch.tensor([[0, 0, 0, 1, 2, 3]], dtype=torch.int32))
