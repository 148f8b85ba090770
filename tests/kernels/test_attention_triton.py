"""Triton attention against the reference in fp64: output, log-sum-exp and every gradient.

Interpreted on the CPU, and on a GPU.

FlashAttention's rule: an error of at most twice that of the same computation in torch in the same
precision, and a rounding of the largest value.
"""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.attention import (
    PackedDocuments,
    PackedSequences,
    Packing,
    attention,
    attention_packed,
    launch,
    reference,
)
from kernels.attention.call import AttentionCall
from kernels.attention.intervals import Slices
from kernels.attention.launch import Tile, Tiles
from kernels.choice import WIDEST_HEAD

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning:triton.*")
everywhere = pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float32),
        ("cpu", torch.float16),
        *(
            pytest.param("cuda", t, marks=gpu)
            for t in (torch.float32, torch.float16, torch.bfloat16)
        ),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)


@contextmanager
def tiles(m: int, n: int):
    """Launch small tiles: several of them in few tokens, cheap to interpret. 0: the usual ones."""
    if not m:
        yield
        return
    small = Tile(m, n, 4, 1)
    chosen = Tiles(*({WIDEST_HEAD: small} for _ in Tiles._fields))
    with mock.patch.multiple(launch, WIDE=small, tiles_of=lambda device: chosen):
        yield


@contextmanager
def device_of(multiprocessors: int):
    """Launch as on a device with so many multiprocessors; 0: as on this one."""
    if not multiprocessors:
        yield
        return
    with mock.patch.object(launch, "multiprocessors_of", return_value=multiprocessors):
        yield


def naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Packing | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention in torch; scores and weights are rounded to the inputs' precision."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).float() * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    slices = Slices.of(q.shape[1], k.shape[1])
    mask = AttentionCall(slices, scale, documents, window).mask(q.device)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat(
            (scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1
        )
    any_visible = mask.any(-1, keepdim=True) | (sinks is not None)
    weights = torch.where(any_visible, scores, 0.0).softmax(-1)
    weights = torch.where(any_visible, weights, 0.0)[..., : k.shape[1]].to(q.dtype)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), torch.where(
        any_visible, scores, 0.0
    ).logsumexp(-1).masked_fill(~any_visible.squeeze(-1), -torch.inf)


def assert_as_exact(
    actual: Tensor,
    exact: Tensor,
    plain: Tensor,
    dtype: torch.dtype,
    name: str,
    cancelled: float = 0.0,
) -> None:
    """Check an error against torch's. cancelled: largest term that may cancel in a difference."""
    finite = exact.isfinite()
    assert torch.equal(actual.isfinite(), finite), (
        f"{name}: not finite where it should be, or the other way round"
    )
    if not finite.any():
        return
    own, theirs = (
        (x.detach().double() - exact)[finite].abs().max().item() for x in (actual, plain)
    )
    roundings = 16 if dtype == torch.float32 else 4
    largest = max(exact[finite].abs().max().item(), 1.0)
    bound = 2 * theirs + roundings * torch.finfo(dtype).eps * largest
    # Where a query sees one key its gradient is a difference of equal fp32 sums: exactly 0 in
    # torch, which sums both in one order; here one is dout v and the other dout out, each with a
    # rounding of its own.
    bound += 2 * torch.finfo(torch.float32).eps * cancelled
    assert own <= bound, f"{name}: error {own:.3g} above {bound:.3g}; torch's is {theirs:.3g}"


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Packing | None = None,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    through_lse: bool = True,
    seed: int = 0,
) -> None:
    leaves = [
        t.detach().requires_grad_() if t.is_contiguous() else t.requires_grad_() for t in (q, k, v)
    ] + ([] if sinks is None else [sinks.detach().requires_grad_()])
    wide = [t.detach().double().requires_grad_() for t in leaves]
    scale = q.shape[3] ** -0.5 * 1.5
    options = {"documents": documents, "window": window, "softcap": softcap, "scale": scale}
    wide_sinks = None if sinks is None else wide[3]
    exact = reference.run(
        *wide[:3],
        AttentionCall(Slices.of(q.shape[1], k.shape[1]), sinks=wide_sinks, **options),
    )
    plain = naive(
        *leaves[:3], documents, window, scale, softcap, leaves[3] if sinks is not None else None
    )
    actual = attention(
        *leaves[:3],
        **options,
        sinks=leaves[3] if sinks is not None else None,
        return_lse=True,
        implementation="triton",
    )
    assert actual[0].dtype == q.dtype and actual[1].dtype == torch.float32
    for f, e, p, name in zip(actual, exact, plain, ("out", "lse"), strict=True):
        assert_as_exact(f, e.detach(), p, q.dtype, name)
    generator = torch.Generator().manual_seed(seed)
    above = [torch.randn(x.shape, generator=generator).to(q.device) for x in actual]

    def loss(out: Tensor, lse: Tensor) -> Tensor:
        total = (out.to(torch.promote_types(out.dtype, torch.float32)) * above[0]).sum()
        return total + (torch.where(lse.isfinite(), lse, 0.0) * above[1]).sum() * through_lse

    gradients = [
        torch.autograd.grad(loss(*pair), ls)
        for pair, ls in ((actual, leaves), (exact, wide), (plain, leaves))
    ]
    values = v.detach().double().abs().repeat_interleave(q.shape[2] // v.shape[2], 2)
    products = torch.einsum("bqhd,bkhd->bhqk", above[0].double().abs(), values).max().item()
    other = {"dq": k, "dk": q}  # a score's gradient is multiplied by it
    for f, e, p, name in zip(*gradients, ("dq", "dk", "dv", "d_sinks"), strict=False):
        factor = scale * other[name].detach().abs().max().item() if name in other else 0.0
        assert_as_exact(f, e, p, q.dtype, name, products * factor)


def qkv(
    rows: int,
    queries: int,
    keys: int,
    heads: int,
    kv_heads: int,
    width: int,
    value_width: int,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = (
        (rows, queries, heads, width),
        (rows, keys, kv_heads, width),
        (rows, keys, kv_heads, value_width),
    )
    return [torch.randn(s, generator=g).to(device, dtype) for s in shapes]


@pytest.mark.thorough
@everywhere
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_output_and_gradients(device: str, dtype: torch.dtype, data: st.DataObject) -> None:
    draw = data.draw
    few = device == "cuda"  # there each width, group and tile is compiled, for seconds
    rows = draw(st.integers(1, 2), "rows")
    kv_heads = draw(st.integers(1, 2), "kv heads")
    group = draw(st.integers(1, 2 if few else 3), "group")
    kind = draw(st.sampled_from(["causal", "documents", "sequences"]), "packing")
    longest = 300 if few else 70
    queries = draw(st.integers(1, longest), "queries")
    keys = draw(st.integers(1, longest), "keys") if kind == "causal" else queries
    width = draw(st.sampled_from([16] if few else [8, 16, 24]), "width")
    value_width = draw(st.sampled_from([width, 40]), "value width")
    seed = draw(st.integers(0, 999), "seed")
    g = torch.Generator().manual_seed(seed)
    documents = None
    if kind == "documents":
        documents = PackedDocuments(
            (torch.rand(rows, queries, generator=g) < 0.08).cumsum(1).int().to(device)
        )
    elif kind == "sequences":  # different lengths of queries and keys, some of them empty
        rows, count = 1, draw(st.integers(1, 5), "sequences")
        lengths = [torch.randint(0, 30, (count,), generator=g) for _ in range(2)]
        queries, keys = (max(int(x.sum()), 1) for x in lengths)
        cu = [
            torch.cat((torch.zeros(1, dtype=torch.int64), x.cumsum(0))).int().to(device)
            for x in lengths
        ]
        documents = PackedSequences(*cu, queries, keys)
    sinks = (
        torch.randn(kv_heads * group, generator=g).to(device)
        if draw(st.booleans(), "sinks")
        else None
    )
    processors = 0 if few else draw(st.sampled_from([1, 8]), "multiprocessors")
    with (
        tiles(*draw(st.sampled_from([(0, 0)] if few else [(16, 16), (32, 16), (16, 32)]), "tiles")),
        device_of(processors),
    ):
        check(
            *qkv(
                rows,
                queries,
                keys,
                kv_heads * group,
                kv_heads,
                width,
                value_width,
                dtype,
                device,
                seed,
            ),
            documents,
            window=draw(st.sampled_from([None, 1, 7, 40]), "window"),
            softcap=draw(st.sampled_from([None, 2.0]), "softcap"),
            sinks=sinks,
            through_lse=draw(st.booleans(), "through lse"),
            seed=seed,
        )


@pytest.mark.thorough
@everywhere
@pytest.mark.parametrize("width", [16, 64, 96, 128, 256])
def test_head_widths_and_launched_tiles(device: str, dtype: torch.dtype, width: int) -> None:
    check(*qkv(1, 150, 150, 2, 1, width, width, dtype, device), window=100)


@pytest.mark.thorough
@everywhere
@pytest.mark.parametrize("multiprocessors", [4, 100])
def test_few_key_heads(device: str, dtype: torch.dtype, multiprocessors: int) -> None:
    """Two parts of three query heads, and six of one."""
    with tiles(16, 16), device_of(multiprocessors):
        check(*qkv(1, 40, 40, 12, 2, 16, 24, dtype, device), window=30)


def test_groups_are_divided_where_multiprocessors_would_be_idle() -> None:
    divided = [
        launch.parts_of_group(group, programs, 132)
        for group, programs in ((1, 1), (8, 264), (8, 263), (8, 64), (6, 100), (3, 1))
    ]
    assert divided == [1, 1, 2, 8, 3, 3]


@pytest.mark.thorough
@everywhere
def test_queries_that_see_nothing(device: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 50, 20, 2, 1, 16, 16, dtype, device)
    with tiles(16, 16):
        check(q, k, v)
        out, lse = attention(q, k, v, return_lse=True, implementation="triton")
    assert (
        out[:, :30].eq(0).all()
        and lse[:, :, :30].eq(-torch.inf).all()
        and lse[:, :, 30:].isfinite().all()
    )


@pytest.mark.thorough
@everywhere
def test_views_of_one_projection_and_strided_gradients(device: str, dtype: torch.dtype) -> None:
    """q, k and v as slices of one tensor; a transposed and an expanded gradient of the output."""
    together = qkv(2, 40, 40, 6, 6, 16, 16, dtype, device)[0].requires_grad_()
    q, k, v = together[:, :, :2], together[:, :, 2:4], together[:, :, 4:]
    results = []
    for implementation in ("triton", "reference"):
        with tiles(16, 16):
            out = attention(q, k, v, implementation=implementation)
            turned = (
                torch.randn(2, 16, 2, 40, generator=torch.Generator().manual_seed(3))
                .to(device, dtype)
                .permute(0, 3, 2, 1)
            )
            results.append(
                [
                    torch.autograd.grad(out, together, turned, retain_graph=True)[0],
                    torch.autograd.grad(out.sum(), together)[0],
                ]
            )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(
            a,
            b,
            atol=5e-3 if dtype != torch.float32 else 1e-5,
            rtol=1e-2 if dtype != torch.float32 else 1e-5,
        )


@pytest.mark.thorough
@everywhere
def test_same_bits_every_time(device: str, dtype: torch.dtype) -> None:
    inputs = [t.requires_grad_() for t in qkv(1, 60, 60, 4, 2, 16, 16, dtype, device)]
    results = []
    for _ in range(2 if device == "cpu" else 250):
        with tiles(16, 16):
            out = attention(*inputs, implementation="triton")
            results.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
    assert all(
        torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True)
    )


@pytest.mark.thorough
def test_packed_form_is_that_of_rows() -> None:
    q, k, v = qkv(2, 20, 20, 4, 2, 16, 16, torch.float32, "cpu")
    cu = torch.tensor([0, 20, 20, 40, 40], dtype=torch.int32)
    for implementation in ("triton", "reference", "sdpa"):
        whole = attention(q, k, v, implementation=implementation)
        packed = attention_packed(
            *(t.flatten(0, 1) for t in (q, k, v)), cu, implementation=implementation
        )
        torch.testing.assert_close(packed, whole.flatten(0, 1), atol=2e-6, rtol=1e-5)
    out, lse = attention_packed(*(t.flatten(0, 1) for t in (q, k, v)), cu, return_lse=True)
    assert out.shape == (40, 4, 16) and lse.shape == (4, 40)


@pytest.mark.parametrize("queries", [0, 1])
def test_empty_and_single(queries: int) -> None:
    inputs = [
        t.requires_grad_() for t in qkv(1, queries, queries, 2, 1, 16, 16, torch.float32, "cpu")
    ]
    out = attention(*inputs, implementation="triton")
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert out.shape == (1, queries, 2, 16) and [g.shape for g in gradients] == [
        t.shape for t in inputs
    ]
    if queries:
        torch.testing.assert_close(out, inputs[2].expand(-1, -1, 2, -1))
