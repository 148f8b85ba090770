"""The rule that divides tokens into chunks, and the errors that it rests on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.bench import gradient_error
from kernels.cross_entropy.chunking import MIB, BudgetError, padded, plan_chunks

BF16 = {"logits_bytes": 2, "gradient_bytes": 2}
REFERENCE = (8192, 4096, 128256)


def test_the_default_budget_takes_the_reference_shape_in_one_chunk() -> None:
    plan = plan_chunks(*REFERENCE, **BF16, budget=2048 * MIB)
    assert (plan.rows, plan.chunks, plan.accumulator) == (8192, 1, False) and plan.workspace == 8192 * 128256 * 2


def test_small_takes_four_chunks_and_no_accumulator() -> None:
    plan = plan_chunks(*REFERENCE, **BF16, budget=2048 * MIB, mode="small")
    assert (plan.rows, plan.chunks, plan.accumulator) == (2048, 4, False)
    gradients = 2 * 4096 * (8192 + 128256)
    assert (plan.workspace + gradients) / MIB < 1.4 * 1129  # Liger's default at this shape


def test_a_tight_budget_takes_an_accumulator_and_large_chunks() -> None:
    plan = plan_chunks(65536, 4096, 128256, **BF16, budget=2048 * MIB)
    assert plan.accumulator and plan.rows % 128 == 0 and plan.rows >= 1024 and plan.workspace <= 2048 * MIB
    assert plan.chunks * plan.rows - 65536 < 128 * plan.chunks  # alike, the last is no sliver


def test_fp32_gradients_are_their_own_accumulator() -> None:
    plan = plan_chunks(4096, 512, 50304, logits_bytes=4, gradient_bytes=4, budget=256 * MIB)
    assert not plan.accumulator and plan.chunks == 4 and plan.workspace <= 256 * MIB


def test_the_budget_error_names_one_that_works() -> None:
    with pytest.raises(BudgetError, match=r"a workspace of 256 MiB is too small for the loss: 128 tokens at once take 2004 MiB"):
        plan_chunks(65536, 4096, 128256, **BF16, budget=256 * MIB)
    assert plan_chunks(65536, 4096, 128256, **BF16, budget=2004 * MIB).accumulator


@given(tokens=st.integers(0, 200_000), width=st.integers(1, 8192), vocabulary=st.integers(2, 262_144), logits=st.sampled_from([2, 4, 8]),
       gradient=st.sampled_from([None, 2, 4, 8]), budget=st.integers(1, 4096), mode=st.sampled_from(["precise", "small"]))
def test_every_plan_keeps_its_promises(tokens: int, width: int, vocabulary: int, logits: int, gradient: int | None, budget: int, mode: str) -> None:
    shape = {"logits_bytes": logits, "gradient_bytes": gradient, "budget": budget * MIB, "mode": mode}
    try:
        plan = plan_chunks(tokens, width, vocabulary, **shape)
    except BudgetError as error:
        need = int(str(error).split("take ")[1].split(" MiB")[0])
        assert need >= budget and plan_chunks(tokens, width, vocabulary, **shape | {"budget": need * MIB}).chunks >= 1
        return
    assert plan == plan_chunks(tokens, width, vocabulary, **shape)
    assert plan.rows >= 1 and plan.chunks == max(-(-tokens // plan.rows), 1)
    slab = min(plan.rows, tokens) * padded(vocabulary) * logits
    assert slab <= plan.workspace <= budget * MIB
    if plan.accumulator:  # fp32 matrix and slab; the 16-bit result comes to be in the slab's place
        matrix = vocabulary * width
        assert gradient == 2 and plan.workspace >= 4 * matrix - 2 * matrix + slab
    elif gradient == 2:
        assert plan.chunks == 1 or (mode == "small" and plan.chunks <= 4)


def test_errors_by_number_of_chunks() -> None:
    """What docs/kernels.md says of the two modes, on fewer tokens."""
    found = gradient_error.table(2048, 64, 2048, [1, 2, 4, 32])
    assert all(e <= 0.0018 for e in found["fp32"].values()) and found["bf16"]["1"] == found["fp32"]["1"]
    assert found["bf16"]["1"] < found["bf16"]["2"] < found["bf16"]["4"] < found["bf16"]["32"]
