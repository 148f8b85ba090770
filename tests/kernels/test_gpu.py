"""Tests that need a GPU. The other files of this folder also run on one, with `make gpu-check`."""

from __future__ import annotations

import pytest
import torch

from kernels.attention import PackedDocuments, attention
from kernels.bench.cross_entropy import error, exact_slices, inputs
from kernels.bench.machine import measure_peak
from kernels.causality import check_attention
from kernels.choice import ATTENTION
from kernels.cross_entropy import linear_cross_entropy
from kernels.cross_entropy.chunking import MIB, plan_chunks
from tests.kernels.test_attention_slices import starts_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def usable(table: dict, dtype: torch.dtype) -> list[str]:
    """Implementations that this process can use on CUDA; FlashAttention takes 16 bits only."""
    return [
        n
        for n, i in table.items()
        if not i.refusals("cuda") and (n not in ("flash_attn", "varlen") or dtype == torch.bfloat16)
    ]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention_agrees_with_the_cpu_reference(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 96, h, 64, generator=generator) for h in (4, 2, 2))
    ids = torch.tensor([[0] * 40 + [1] * 56, [0] * 96], dtype=torch.int32)
    expected = attention(q, k, v, documents=PackedDocuments(ids), implementation="reference")
    for name in usable(ATTENTION, dtype):
        actual = attention(
            *(t.cuda().to(dtype) for t in (q, k, v)),
            documents=PackedDocuments(ids.cuda(), starts_of(ids, 4).cuda()),
            implementation=name,
        )
        torch.testing.assert_close(
            actual.float().cpu(),
            expected,
            atol=TOLERANCE[dtype],
            rtol=TOLERANCE[dtype],
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention_is_causal(dtype: torch.dtype) -> None:
    for name in usable(ATTENTION, dtype):
        check_attention(name, "cuda", dtype)  # raises CausalityError


def test_attention_beyond_32_bit_offsets() -> None:
    """2.4e9 elements of queries: the last row equals a run on it alone, forward and backward."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(
            9, 65536, h, 256, generator=generator, device="cuda", dtype=torch.bfloat16
        ).requires_grad_()
        for h in (16, 1, 1)
    )
    out = attention(q, k, v, window=64, implementation="triton")
    whole = torch.autograd.grad(out.sum(), (q, k, v))
    last = [t.detach()[-1:].requires_grad_() for t in (q, k, v)]
    alone = attention(*last, window=64, implementation="triton")
    assert torch.equal(out[-1:], alone)
    assert all(
        torch.equal(a[-1:], b)
        for a, b in zip(whole, torch.autograd.grad(alone.sum(), last), strict=True)
    )


@pytest.mark.parametrize("length", [1, 127, 4097, 131072])
def test_attention_of_any_length(length: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(
            1, length, h, 64, generator=generator, device="cuda", dtype=torch.bfloat16
        ).requires_grad_()
        for h in (2, 1, 1)
    )
    actual, expected = (attention(q, k, v, implementation=name) for name in ("triton", "sdpa"))
    torch.testing.assert_close(actual, expected, atol=2e-2, rtol=2e-2)
    for a, b in zip(
        *(torch.autograd.grad(out.sum(), (q, k, v)) for out in (actual, expected)), strict=True
    ):
        assert (a - b).float().norm() <= 0.02 * b.float().norm()


def test_attention_never_waits_for_the_device() -> None:
    q, k, v = (
        torch.randn(2, 300, h, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for h in (4, 2, 2)
    )
    ids = torch.randint(0, 2, (2, 300), device="cuda").cumsum(1)
    for _ in range(2):  # the first one compiles, and runs the self-test
        attention(
            q,
            k,
            v,
            documents=PackedDocuments(ids),
            window=50,
            implementation="triton",
        ).sum().backward()
        torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")
    assert q.grad.isfinite().all()


def loss_inputs(n: int, d: int, v: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (
        torch.randn(r, d, generator=generator, device="cuda").bfloat16() for r in (n, v)
    )
    return (
        hidden.requires_grad_(),
        (weight / d**0.5).detach().requires_grad_(),
        torch.randint(0, v, (n,), generator=generator, device="cuda"),
    )


@pytest.mark.parametrize(("mode", "budget"), [("precise", 2048), ("precise", 512), ("small", 2048)])
@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
def test_loss_stays_within_its_budget(
    mode: str, budget: int, logits_dtype: torch.dtype | None
) -> None:
    n, d, v = 4096, 1024, 65539
    hidden, weight, targets = loss_inputs(n, d, v)
    plan = plan_chunks(
        n,
        d,
        v,
        logits_bytes=4 if logits_dtype else 2,
        gradient_bytes=2,
        budget=budget * MIB,
        mode=mode,
    )

    def step() -> None:
        hidden.grad = weight.grad = None
        linear_cross_entropy(
            hidden,
            weight,
            targets,
            gradient=mode,
            workspace_bytes=budget * MIB,
            logits_dtype=logits_dtype,
        ).loss.backward()

    step()  # cuBLAS and Triton initialise
    hidden.grad = weight.grad = None
    peak = measure_peak("cuda", step)
    assert peak <= plan.workspace + 2 * d * (n + v) + 8 * MIB, f"{peak / MIB:.0f} MiB at {plan}"


@pytest.mark.parametrize(("mode", "bound"), [("precise", 0.0018), ("small", 0.0022)])
def test_loss_keeps_the_error_of_its_mode(mode: str, bound: float) -> None:
    """Both with several chunks: fp32 sums, and fp16 sums."""
    hidden, weight, targets = inputs(8192, 1024, 50304, "cuda", torch.bfloat16)
    linear_cross_entropy(hidden, weight, targets, gradient=mode, chunk_tokens=1024).loss.backward()
    assert error(weight.grad, exact_slices(hidden, weight, targets)[1]) <= bound


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_loss_never_waits_for_the_device(reduction: str) -> None:
    hidden, weight, targets = loss_inputs(512, 64, 1000)
    weight_sum = torch.tensor(400.0, device="cuda")
    for _ in range(2):  # the first one compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = linear_cross_entropy(
                hidden,
                weight,
                targets,
                weight_sum=weight_sum,
                reduction=reduction,
                z_loss_coefficient=1e-4,
                chunk_tokens=128,
            )
            (out.loss.sum() * 0.5).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert out.loss.isfinite().all()


def test_loss_beyond_32_bit_offsets() -> None:
    """2^31 logits and more in one slab: the last rows equal a run on them alone."""
    hidden, weight, targets = loss_inputs(16500, 64, 131072)
    out = linear_cross_entropy(hidden, weight, targets, weight_sum=1.0, chunk_tokens=16500)
    whole = torch.autograd.grad(out.loss, hidden)[0][-100:]
    last = hidden.detach()[-100:].requires_grad_()
    alone = linear_cross_entropy(last, weight, targets[-100:], weight_sum=1.0)
    assert torch.equal(out.nats[-100:], alone.nats)
    torch.testing.assert_close(whole, torch.autograd.grad(alone.loss, last)[0])


def test_loss_gives_the_same_bits() -> None:
    results = []
    for _ in range(3):
        hidden, weight, targets = loss_inputs(3000, 128, 50257)
        out = linear_cross_entropy(hidden, weight, targets, gradient="small", chunk_tokens=1024)
        results.append((out.loss.detach(), *torch.autograd.grad(out.loss, (hidden, weight))))
    assert all(
        torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True)
    )
