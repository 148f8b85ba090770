"""Attention: every implementation against the fp64 definition, and its causality."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import LeftPadded, PackedDocuments, PackedSequences, attention
from kernels.attention.call import AttentionCall
from kernels.attention.intervals import Slices
from kernels.causality import CausalityError, check_attention
from kernels.choice import ATTENTION, choose_attention

ON_CPU = [i.name for i in ATTENTION.values() if not i.refusals("cpu")]


def naive(q, k, v, ids=None, window=None, softcap=None, sinks=None):
    """One score at a time, fp64."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -math.inf)
    group, shift = q.shape[2] // k.shape[2], k.shape[1] - q.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for i in range(q.shape[1]):
                visible = [
                    j
                    for j in range(k.shape[1])
                    if j <= i + shift
                    and (window is None or i + shift - j < window)
                    and (ids is None or ids[b, i] == ids[b, j])
                ]
                scores = [
                    float(q[b, i, h].double() @ k[b, j, h // group].double())
                    / math.sqrt(q.shape[3])
                    for j in visible
                ]
                if softcap:
                    scores = [softcap * math.tanh(s / softcap) for s in scores]
                total = sum(math.exp(s) for s in scores) + (
                    math.exp(float(sinks[h])) if sinks is not None else 0.0
                )
                if total:
                    lse[b, h, i] = math.log(total)
                for s, j in zip(scores, visible, strict=True):
                    out[b, i, h] += math.exp(s) / total * v[b, j, h // group].double()
    return out, lse


@pytest.mark.thorough
@pytest.mark.parametrize("name", ON_CPU)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_matches_the_definition(name: str, data: st.DataObject) -> None:
    features = ATTENTION[name].features
    keys = data.draw(st.integers(1, 9))
    packed = data.draw(st.booleans())
    queries = keys if packed else data.draw(st.integers(1, 9))
    kv_heads, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    window = data.draw(st.none() | st.integers(1, 5))
    softcap = data.draw(st.none() | st.just(2.0)) if "softcap" in features else None
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    q = torch.randn(2, queries, kv_heads * group, 8, generator=generator)
    k, v = (torch.randn(2, keys, kv_heads, 8, generator=generator) for _ in range(2))
    sinks = (
        torch.randn(kv_heads * group, generator=generator)
        if "sinks" in features and data.draw(st.booleans())
        else None
    )
    ids = torch.randint(0, 2, (2, keys), generator=generator).cumsum(1).int() if packed else None
    documents = PackedDocuments(ids) if packed else None
    options = {
        "documents": documents,
        "window": window,
        "softcap": softcap,
        "sinks": sinks,
        "implementation": name,
    }
    want, want_lse = naive(q, k, v, ids, window, softcap, sinks)
    if "lse" in features:
        out, lse = attention(q, k, v, return_lse=True, **options)
        torch.testing.assert_close(lse.double(), want_lse.double(), atol=1e-5, rtol=1e-5)
    else:
        out = attention(q, k, v, **options)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("window", [None, 3])
def test_nothing_looks_ahead(name: str, window: int | None) -> None:
    check_attention(name, window=window)
    assert "documents" in ATTENTION[name].features


def test_the_check_detects_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    def full_mask(call: AttentionCall, device: torch.device) -> torch.Tensor:
        shape = 1, 1, call.slices.queries, call.slices.keys
        return torch.ones(shape, dtype=torch.bool, device=device)

    monkeypatch.setattr(AttentionCall, "mask", full_mask)
    with pytest.raises(CausalityError, match="may not see"):
        check_attention("sdpa", window=3)


def test_gradients_equal_the_reference() -> None:
    ids = torch.tensor([[0, 0, 1, 1, 1, 2]])
    inputs = [torch.randn(1, 6, h, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    results = []
    for name in ("reference", "sdpa"):
        out = attention(*inputs, documents=PackedDocuments(ids), implementation=name)
        results.append(
            torch.autograd.grad((out * torch.arange(out.numel()).view_as(out)).sum(), inputs)
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_reference_is_differentiable_everywhere_and_empty_rows_give_zero() -> None:
    q = torch.randn(1, 5, 2, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    out, lse = attention(q, k, v, return_lse=True, implementation="reference")
    assert out[:, :2].eq(0).all() and lse[:, :, :2].eq(-math.inf).all()
    gradients = torch.autograd.grad(out.sum() + lse[:, :, 2:].sum(), (q, k, v))
    assert all(g.isfinite().all() for g in gradients)
    assert gradients[0][:, :2].eq(0).all()


@pytest.mark.thorough
@pytest.mark.parametrize("name", [n for n in ON_CPU if "documents" in ATTENTION[n].features])
@pytest.mark.parametrize(("queries", "window"), [(1, None), (1, 2), (4, None), (4, 3), (7, None)])
def test_left_padding_is_a_document_of_its_own(name: str, queries: int, window: int | None) -> None:
    """The last queries of whole rows of two documents.

    The padding may also cover some queries.
    """
    padding, keys = torch.tensor([0, 2, 5]), 7
    q, k, v = (torch.randn(3, keys, heads, 8) for heads in (4, 2, 2))
    ids = (torch.arange(keys) >= padding.unsqueeze(1)).int()
    want, _ = naive(q, k, v, ids, window)
    documents, slices = LeftPadded(padding), Slices.of(queries, keys)
    out = attention(q[:, -queries:], k, v, documents=documents, window=window, implementation=name)
    torch.testing.assert_close(out.double(), want[:, -queries:], atol=1e-5, rtol=1e-5)
    sequences = PackedSequences(*documents.cu_seqlens(slices), 3 * queries, 3 * keys)
    flat = sequences.mask(Slices.of(3 * queries, 3 * keys), window)[0, 0]
    assert torch.equal(flat, torch.block_diag(*documents.mask(slices, window)[:, 0]).bool())


def test_inconsistent_packings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[B\], got shape \(1, 1\)"):
        LeftPadded(torch.tensor([[1]]))
    q, k, v = (torch.zeros(2, 4, heads, 8) for heads in (4, 2, 2))
    with pytest.raises(ValueError, match="padding of 1 rows does not fit 2"):
        attention(q, k, v, documents=LeftPadded(torch.tensor([1])))
    ids = torch.zeros(2, 5, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"do not fit 2 rows with queries at 2..6"):
        attention(q, k, v, query_offset=2, documents=PackedDocuments(ids))
    with pytest.raises(ValueError, match="not known"):
        PackedDocuments(ids).cu_seqlens(Slices.of(5, 5))
    cu = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="no offsets"):
        attention(q[:1], k[:1], v[:1], query_offset=2, documents=PackedSequences(cu, cu, 4, 4))


def test_choice_names_the_missing_feature() -> None:
    assert choose_attention("auto", "cpu", {"documents"}).name == "sdpa"
    assert choose_attention("auto", "cpu", {"sinks", "lse"}).name == "reference"
    with pytest.raises(ValueError, match=r"sdpa.*has no sinks"):
        choose_attention("sdpa", "cpu", {"sinks"})
    with pytest.raises(ValueError, match=r"unknown implementation 'sdp'.*reference"):
        choose_attention("sdp", "cpu", set())


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        (((1, 4, 3, 8), (1, 4, 2, 8), (1, 4, 2, 8)), "3 query heads"),
        (((1, 4, 2, 8), (1, 4, 2, 4), (1, 4, 2, 8)), "do not fit"),
        (((4, 2, 8), (1, 4, 2, 8), (1, 4, 2, 8)), r"\[B, S, H, D\]"),
    ],
)
def test_shapes_are_checked(shapes: tuple, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        attention(*(torch.zeros(s) for s in shapes))
