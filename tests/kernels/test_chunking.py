"""Chunking rule of the loss, and the errors behind it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.bench import gradient_error
from kernels.cross_entropy import linear_cross_entropy
from kernels.cross_entropy.chunking import MIB, BudgetError, padded, plan_chunks

BF16 = {"logits_bytes": 2, "gradient_bytes": 2}
REFERENCE = (8192, 4096, 128256)


def test_the_default_budget_takes_the_reference_shape_in_one_chunk() -> None:
    plan = plan_chunks(*REFERENCE, **BF16, budget=2048 * MIB)
    assert (plan.rows, plan.chunks, plan.sums) == (
        8192,
        1,
        "result",
    ) and plan.workspace == 8192 * 128256 * 2


def test_small_takes_eight_chunks_and_no_more_memory() -> None:
    plan = plan_chunks(*REFERENCE, **BF16, budget=2048 * MIB, mode="small")
    assert (plan.rows, plan.chunks, plan.sums) == (1024, 8, "fp16")
    gradients = 2 * 4096 * (8192 + 128256)
    assert (plan.workspace + gradients) / MIB < 1.2 * 1129  # Liger's default at this shape


def test_small_takes_more_chunks_where_the_budget_asks_for_them() -> None:
    plan = plan_chunks(*REFERENCE, **BF16, budget=100 * MIB, mode="small")
    assert (plan.rows, plan.sums) == (384, "fp16") and plan.workspace <= 100 * MIB


def test_a_tight_budget_takes_fp32_sums_and_large_chunks() -> None:
    plan = plan_chunks(65536, 4096, 128256, **BF16, budget=2048 * MIB)
    assert (
        plan.sums == "fp32"
        and plan.rows % 128 == 0
        and plan.rows >= 1024
        and plan.workspace <= 2048 * MIB
    )
    assert plan.chunks * plan.rows - 65536 < 128 * plan.chunks  # about equal


def test_fp32_gradients_are_their_own_sums() -> None:
    plan = plan_chunks(4096, 512, 50304, logits_bytes=4, gradient_bytes=4, budget=256 * MIB)
    assert plan.sums == "result" and plan.chunks == 4 and plan.workspace <= 256 * MIB


def test_the_budget_error_names_one_that_works() -> None:
    with pytest.raises(
        BudgetError,
        match=r"a workspace of 256 MiB is too small for the loss: 128 tokens at once take 2004 MiB",
    ):
        plan_chunks(65536, 4096, 128256, **BF16, budget=256 * MIB)
    assert plan_chunks(65536, 4096, 128256, **BF16, budget=2004 * MIB).sums == "fp32"


@given(
    tokens=st.integers(0, 200_000),
    width=st.integers(1, 8192),
    vocabulary=st.integers(2, 262_144),
    logits=st.sampled_from([2, 4, 8]),
    gradient=st.sampled_from([None, 2, 4, 8]),
    budget=st.integers(1, 4096),
    mode=st.sampled_from(["precise", "small"]),
)
def test_every_plan_keeps_its_promises(
    tokens: int,
    width: int,
    vocabulary: int,
    logits: int,
    gradient: int | None,
    budget: int,
    mode: str,
) -> None:
    shape = {
        "logits_bytes": logits,
        "gradient_bytes": gradient,
        "budget": budget * MIB,
        "mode": mode,
    }
    try:
        plan = plan_chunks(tokens, width, vocabulary, **shape)
    except BudgetError as error:
        need = int(str(error).split("take ")[1].split(" MiB")[0])
        assert (
            need >= budget
            and plan_chunks(tokens, width, vocabulary, **shape | {"budget": need * MIB}).chunks >= 1
        )
        return
    assert plan == plan_chunks(tokens, width, vocabulary, **shape)
    assert plan.rows >= 1 and plan.chunks == max(-(-tokens // plan.rows), 1)
    slab = min(plan.rows, tokens) * padded(vocabulary) * logits
    assert slab <= plan.workspace <= budget * MIB
    # fp32 matrix and slab; the 16-bit result reuses the slab's memory
    if plan.sums == "fp32":
        matrix = vocabulary * width
        assert gradient == 2 and plan.workspace >= 4 * matrix - 2 * matrix + slab
    elif gradient == 2:
        assert plan.chunks == 1 or (mode == "small" and plan.sums == "fp16" and plan.chunks <= 32)
    else:
        assert plan.sums == "result"


@pytest.mark.thorough
def test_errors_by_number_of_chunks() -> None:
    """The two modes as in docs/kernels.md, on fewer tokens."""
    errors = gradient_error.table(2048, 64, 2048, [1, 4, 8, 32])
    for inputs in ("independent", "like text"):
        bf16, fp16, fp32 = (errors[f"{inputs}, {sums}"] for sums in ("bf16", "fp16", "fp32"))
        assert all(e <= 0.0018 for e in fp32.values()), fp32
        assert all(e <= 0.0022 for e in fp16.values()) and fp16["8"] <= 1.1 * fp32["8"], fp16
        assert bf16["32"] > 2 * fp16["32"]  # the gain of the mode


@pytest.mark.parametrize("magnitude", [1e-25, 1e-6, 1.0, 1e6])
def test_half_sums_know_no_magnitude(magnitude: float) -> None:
    """Weights of a step of a hundred million tokens, a loss scale, hidden states without a norm."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 16, generator=generator) * 1e3
    weight = torch.randn(300, 16, generator=generator) * 1e-3
    hidden, weight = hidden.bfloat16(), weight.bfloat16().requires_grad_()
    targets = torch.randint(0, 300, (64,), generator=generator)
    for z_loss_coefficient in (0.0, 1e-2):
        small, precise = (
            torch.autograd.grad(
                linear_cross_entropy(
                    hidden,
                    weight,
                    targets,
                    weight_sum=1 / magnitude,
                    z_loss_coefficient=z_loss_coefficient,
                    gradient=mode,
                    chunk_tokens=16,
                ).loss,
                weight,
            )[0].double()
            for mode in ("small", "precise")
        )
        assert precise.isfinite().all() and precise.norm() > 0
        assert (small - precise).norm() <= 0.002 * precise.norm()


def test_half_sums_do_not_overflow_where_all_tokens_agree() -> None:
    """The largest possible sum: one target, one hidden state, and a z-loss."""
    hidden = torch.full((4096, 8), 3.0).bfloat16()
    weight = torch.zeros(50, 8).bfloat16().requires_grad_()
    for z_loss_coefficient in (0.0, 1.0):
        small, precise = (
            torch.autograd.grad(
                linear_cross_entropy(
                    hidden,
                    weight,
                    torch.zeros(4096, dtype=torch.long),
                    weight_sum=1.0,
                    z_loss_coefficient=z_loss_coefficient,
                    gradient=mode,
                    chunk_tokens=512,
                ).loss,
                weight,
            )[0]
            for mode in ("small", "precise")
        )
        assert precise[0, 0] < -9000
        torch.testing.assert_close(small, precise, rtol=0.008, atol=0)
