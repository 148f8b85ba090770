"""Attention in torch: operators, compilation, FLOPs, autograd, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels.attention import (
    PackedDocuments,
    PackedSequences,
    attention,
    attention_packed,
    ops,
    triton_attention,
)
from kernels.attention.comparison import difference
from kernels.attention.intervals import Slices, causal, of_documents, of_lengths
from tests.kernels.test_attention_triton import qkv, tiles

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*encountered in.*:RuntimeWarning:triton.*", "ignore::DeprecationWarning:torch.*"
)
CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


@pytest.mark.thorough
@pytest.mark.parametrize("with_sinks", [False, True])
def test_opcheck(with_sinks: bool) -> None:
    inputs = [t.requires_grad_() for t in qkv(2, 20, 20, 4, 2, 16, 24, torch.float32, "cpu")]
    sinks = torch.randn(4, requires_grad=True) if with_sinks else None
    torch.library.opcheck(
        ops.attention,
        (*inputs, sinks, *causal(Slices.of(20, 20), 7, torch.device("cpu")), 0.25, 3.0),
        test_utils=CHECKS,
    )


@pytest.mark.thorough
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()

    def loss(q, k, v, ids, cu):
        out, lse = attention(
            q,
            k,
            v,
            documents=PackedDocuments(ids),
            window=5,
            return_lse=True,
            implementation="triton",
        )
        packed = attention_packed(q[0], k[0], v[0], cu, implementation="triton")
        return out.square().sum() + lse.sum() + packed.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=backend)
    for length in (24, 30):
        inputs = [
            t.requires_grad_() for t in qkv(2, length, length, 2, 1, 16, 16, torch.float32, "cpu")
        ]
        ids = torch.arange(length).expand(2, -1) // 7
        cu = torch.tensor([0, 5, length], dtype=torch.int32)
        a, b = compiled(*inputs, ids, cu), loss(*inputs, ids, cu)
        torch.testing.assert_close(a, b)
        for x, y in zip(
            torch.autograd.grad(a, inputs), torch.autograd.grad(b, inputs), strict=True
        ):
            torch.testing.assert_close(x, y)


@pytest.mark.thorough
def test_flops_are_counted_as_causal() -> None:
    inputs = [t.requires_grad_() for t in qkv(2, 20, 30, 4, 2, 16, 24, torch.float32, "cpu")]
    with FlopCounterMode(display=False) as counter:
        attention(*inputs, implementation="triton").sum().backward()
    pairs = sum(min(i + 10, 29) + 1 for i in range(20))
    assert counter.get_total_flops() == 2 * 2 * 4 * pairs * (16 + 24) + 2 * 2 * 4 * pairs * (
        3 * 16 + 2 * 24
    )


def test_follows_autocast() -> None:
    inputs = qkv(1, 20, 20, 2, 1, 16, 16, torch.float32, "cpu")
    with torch.autocast("cpu", torch.float16):
        out = attention(*inputs, implementation="triton")
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), attention(*inputs), atol=5e-3, rtol=5e-3)


@pytest.mark.thorough
def test_second_derivatives_are_refused() -> None:
    inputs = [t.requires_grad_() for t in qkv(1, 10, 10, 2, 1, 16, 16, torch.float32, "cpu")]
    (g,) = torch.autograd.grad(
        attention(*inputs, implementation="triton").square().sum(), inputs[:1], create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"no autograd formula|does not require grad"):
        torch.autograd.grad(g.sum(), inputs)


@pytest.mark.thorough
def test_only_requested_gradients_are_computed() -> None:
    """Through the output alone, through the log-sum-exp alone, and with frozen queries."""
    q, k, v = qkv(1, 20, 20, 2, 1, 16, 16, torch.float32, "cpu")
    k.requires_grad_()
    for part in (0, 1):
        actual, expected = (
            torch.autograd.grad(
                attention(q, k, v, return_lse=True, implementation=name)[part].square().sum(), k
            )[0]
            for name in ("triton", "reference")
        )
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_intervals_are_the_masks() -> None:
    """The queries that see a key by search are those whose interval contains it."""
    ids = torch.tensor([[0, 0, 0, 1, 2, 2], [5, 5, 5, 5, 5, -1]])
    cu = (
        torch.tensor([0, 2, 2, 6, 6], dtype=torch.int32),
        torch.tensor([0, 3, 4, 5, 5], dtype=torch.int32),
    )
    for window in (None, 1, 2):
        for intervals in (
            causal(Slices.of(6, 4), window, ids.device),
            causal(Slices.of(3, 6), window, ids.device),
            of_documents(ids, Slices.of(6, 6), window),
            of_documents(ids, Slices.of(2, 3, query_offset=1, key_offset=2), window),
            causal(Slices.of(4, 3, query_offset=0, key_offset=2), window, ids.device),
            of_lengths(*cu, 6, 5, window),
        ):
            mask = intervals.mask()[:, 0]
            for key in range(mask.shape[2]):
                for row in range(mask.shape[0]):
                    seeing = [i for i in range(mask.shape[1]) if mask[row, i, key]]
                    start = int(intervals.query_start[row, key])
                    stop = int(intervals.query_stop[row, key])
                    assert seeing == list(range(start, stop)) or (not seeing and stop <= start), (
                        window,
                        row,
                        key,
                    )


def test_sequences_of_different_lengths_align_at_their_ends() -> None:
    mask = of_lengths(
        torch.tensor([0, 2, 5], dtype=torch.int32),
        torch.tensor([0, 3, 4], dtype=torch.int32),
        5,
        4,
        None,
    ).mask()[0, 0]
    assert mask.int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 1],
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 4, 2, 8, dtype=torch.float64)}, "one floating dtype"),
        ({"softcap": -1.0}, "softcap"),
        ({"window": 0}, "window"),
        ({"sinks": torch.zeros(3)}, "one per query head"),
        ({"documents": PackedDocuments(torch.zeros(1, 3))}, "do not fit"),
    ],
)
def test_errors_name_the_argument(change: dict, message: str) -> None:
    arguments = {name: torch.zeros(1, 4, 2, 8) for name in "qkv"} | change
    with pytest.raises(ValueError, match=message):
        attention(**arguments)


def test_unsupported_features_are_named() -> None:
    for widths, dtype, message in (
        ((300, 300), torch.float32, "heads wider than 256"),
        ((8, 8), torch.float64, "fp64"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(
                *(torch.zeros(1, 4, 2, w, dtype=dtype) for w in (*widths, widths[1])),
                implementation="triton",
            )
    with pytest.raises(ValueError, match="int32"):
        PackedSequences(torch.tensor([0, 4]), torch.tensor([0, 4]), 4, 4)


@pytest.mark.thorough
def test_the_self_test_detects_a_wrong_kernel() -> None:
    """The self-test that runs once per process on a GPU, on the CPU."""
    assert difference(triton_attention.run, "cpu") is None

    def wrong(q, k, v, call):
        return triton_attention.run(q, k, v, call._replace(documents=None))

    assert "off by" in difference(wrong, "cpu")
    heads = {"window": None, "sinks": True, "head_dim": 24, "group": 3}
    assert difference(triton_attention.run, "cpu", torch.float32, **heads) is None
    assert "off by" in difference(wrong, "cpu", torch.float32, **heads)
    assert "TypeError" in difference(lambda: None, "cpu")


def test_scale_of_zero_is_the_mean() -> None:
    q, k, v = qkv(1, 33, 33, 1, 1, 16, 16, torch.float32, "cpu")
    with tiles(16, 16):
        out = attention(q, k, v, scale=0.0, implementation="triton")
    torch.testing.assert_close(
        out, v.cumsum(1) / torch.arange(1, 34).view(1, -1, 1, 1), atol=1e-5, rtol=1e-5
    )
    assert math.isfinite(float(out.sum()))


def test_scale_below_zero() -> None:
    inputs = [t.requires_grad_() for t in qkv(1, 33, 33, 1, 1, 16, 16, torch.float32, "cpu")]
    results = []
    for implementation in ("triton", "reference"):
        with tiles(16, 16):
            out = attention(*inputs, scale=-0.5, implementation=implementation)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
