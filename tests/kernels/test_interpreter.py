"""The interpreter as the tests use it against Triton's own."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from kernels.attention import PackedDocuments, attention
from kernels.cross_entropy import linear_cross_entropy, rows_triton
from tests.kernels.test_attention_triton import qkv, tiles
from tests.support.loss_cases import make_case

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning:triton.*"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, not interpreted"),
]


def attend(dtype: torch.dtype) -> list[Tensor]:
    """Three tiles, the second of which sees a whole block of keys, and two documents."""
    inputs = [t.requires_grad_() for t in qkv(1, 36, 36, 2, 1, 24, 16, dtype, "cpu")]
    documents = PackedDocuments(torch.arange(36).unsqueeze(0) // 33)
    options = {"documents": documents, "softcap": 2.0, "sinks": torch.ones(2)}
    with tiles(16, 16):
        out, lse = attention(
            *inputs, window=32, return_lse=True, implementation="triton", **options
        )
        return [out, lse, *torch.autograd.grad(out.float().square().sum() + lse.sum(), inputs)]


def lose(dtype: torch.dtype) -> list[Tensor]:
    """Four rows of four blocks each, and two targets per row."""
    case = make_case(4, 8, 99, targets=2, bias=True, dtype=dtype)
    options = {"softcap": 3.0, "label_smoothing": 0.1, "z_loss_coefficient": 0.1}
    with mock.patch.object(rows_triton, "MAX_BLOCK", 32):
        out = linear_cross_entropy(
            *(case.hidden, case.weight, case.targets),
            bias=case.bias,
            implementation="triton",
            **options,
        )
        return [out.loss, out.nats, out.lse, *torch.autograd.grad(out.loss, case.leaves())]


@pytest.mark.thorough
@pytest.mark.parametrize("compute", [attend, lose])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_same_bits_as_plain(compute, dtype: torch.dtype) -> None:
    from tests.support import interpreter  # not where kernels are compiled

    values = compute(dtype)
    with interpreter.plain():
        expected = compute(dtype)
    assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))
