"""On a GPU: every implementation that runs there against the reference on the CPU."""

from __future__ import annotations

import pytest
import torch

from kernels.attention import PackedDocuments, attention
from kernels.attention.interface import IMPLEMENTATIONS as ATTENTION
from kernels.causality import check_attention
from kernels.cross_entropy import linear_cross_entropy
from kernels.cross_entropy.interface import IMPLEMENTATIONS as CROSS_ENTROPY

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def usable(table: dict, dtype: torch.dtype) -> list[str]:
    """Implementations for CUDA that this process can use; flash-attn takes 16-bit types only."""
    return [n for n, i in table.items() if not i.lacks("cuda", ()) and (n != "flash_attn" or dtype == torch.bfloat16)]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention_agrees_with_the_cpu_reference(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 96, h, 64, generator=generator) for h in (4, 2, 2))
    ids = torch.tensor([[0] * 40 + [1] * 56, [0] * 96], dtype=torch.int32)
    expected = attention(q, k, v, documents=PackedDocuments.from_document_ids(ids), implementation="reference")
    for name in usable(ATTENTION, dtype):
        found = attention(*(t.cuda().to(dtype) for t in (q, k, v)),
                          documents=PackedDocuments.from_document_ids(ids.cuda()), implementation=name)
        torch.testing.assert_close(found.float().cpu(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention_is_causal(dtype: torch.dtype) -> None:
    for name in usable(ATTENTION, dtype):
        check_attention(name, "cuda", dtype)  # raises CausalityError


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cross_entropy_agrees_with_the_cpu_reference(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(70, 64, generator=generator), torch.randn(1000, 64, generator=generator) * 0.1
    targets = torch.randint(0, 1000, (70,), generator=generator)
    expected = linear_cross_entropy(hidden, weight, targets, z_loss=1e-4, implementation="reference")
    for name in usable(CROSS_ENTROPY, dtype):
        found = linear_cross_entropy(hidden.cuda().to(dtype), weight.cuda().to(dtype), targets.cuda(), z_loss=1e-4, implementation=name)
        torch.testing.assert_close(found.nats.float().cpu(), expected.nats, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
