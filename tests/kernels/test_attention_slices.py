"""Attention of slices of a sequence: queries and keys at offsets equal the whole."""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import signature
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen

from kernels.attention import AttentionOutput, PackedDocuments, attention, flash, reference
from kernels.attention.call import AttentionCall
from kernels.attention.intervals import Slices
from kernels.choice import ATTENTION, choose_attention
from tests.kernels.test_attention_triton import qkv, tiles

ON_CPU = [i.name for i in ATTENTION.values() if not i.refusals("cpu")]
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning:triton.*")
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}


def starts_of(ids: Tensor, room: int) -> Tensor:
    """cu_seqlens of documents [B, S], padded to a capacity, as in a batch."""
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = begins.flatten().nonzero().flatten().tolist()
    starts += [ids.numel()] * (room + 1 - len(starts))
    return torch.tensor(starts, dtype=torch.int32)


def draw_cuts(data: st.DataObject, length: int, most: int) -> list[tuple[int, int]]:
    cuts = data.draw(st.sets(st.integers(1, length - 1), max_size=most)) if length > 1 else set()
    borders = [0, *sorted(cuts), length]
    return list(pairwise(borders))


def draw_call(data: st.DataObject, name: str) -> tuple[list[Tensor], dict]:
    """(leaves q, k and v, options) of a whole sequence."""
    length, features = data.draw(st.integers(1, 36), "length"), ATTENTION[name].features
    seed = data.draw(st.integers(0, 999), "seed")
    generator = torch.Generator().manual_seed(seed)
    leaves = [
        t.requires_grad_() for t in qkv(1, length, length, 2, 1, 16, 16, torch.float32, "cpu")
    ]
    options: dict = {"window": data.draw(st.sampled_from([None, 1, 5, 17]), "window")}
    if data.draw(st.booleans(), "documents"):
        ids = (torch.rand(1, length, generator=generator) < 0.1).cumsum(1).int()
        options["documents"] = PackedDocuments(ids)
    if "softcap" in features:
        options["softcap"] = data.draw(st.sampled_from([None, 2.0]), "softcap")
    if "sinks" in features and data.draw(st.booleans(), "sinks"):
        options["sinks"] = torch.randn(2, generator=generator)
    return leaves, options


def weighted(out: Tensor) -> Tensor:
    """A scalar whose gradient by `out` differs in every element."""
    generator = torch.Generator().manual_seed(1)
    return (out * torch.randn(out.shape, generator=generator)).sum()


@pytest.mark.thorough
@pytest.mark.parametrize("name", ON_CPU)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_slices_of_queries_are_the_whole(name: str, data: st.DataObject) -> None:
    """With all keys, and with only those up to the slice's end and within the window."""
    leaves, options = draw_call(data, name)
    q, k, v = leaves
    reach = options["window"]
    parts = []
    with tiles(16, 16):
        whole = attention(q, k, v, implementation=name, **options)
        for start, stop in draw_cuts(data, q.shape[1], 3):
            first, last = 0, k.shape[1]
            if data.draw(st.booleans(), "cut the keys"):
                first = 0 if reach is None else max(start - reach + 1, 0)
                last = stop
            parts.append(
                attention(
                    q[:, start:stop],
                    k[:, first:last],
                    v[:, first:last],
                    query_offset=start,
                    key_offset=first,
                    implementation=name,
                    **options,
                )
            )
        sliced = torch.cat(parts, 1)
        torch.testing.assert_close(sliced, whole, **TOLERANCE)
        gradients = [torch.autograd.grad(weighted(out), leaves) for out in (sliced, whole)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.thorough
@pytest.mark.parametrize("name", [n for n in ON_CPU if "lse" in ATTENTION[n].features])
@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_slices_of_keys_are_put_together_by_their_log_sums(name: str, data: st.DataObject) -> None:
    """Each slice of queries over slices of keys, including keys that no query sees."""
    leaves, options = draw_call(data, name)
    q, k, v = leaves
    sinks = options.pop("sinks", None)
    outs, sums = [], []
    with tiles(16, 16):
        whole = attention(q, k, v, sinks=sinks, return_lse=True, implementation=name, **options)
        for start, stop in draw_cuts(data, q.shape[1], 2):
            pieces = [
                attention(
                    q[:, start:stop],
                    k[:, first:last],
                    v[:, first:last],
                    query_offset=start,
                    key_offset=first,
                    sinks=sinks if first == 0 else None,
                    return_lse=True,
                    implementation=name,
                    **options,
                )
                for first, last in draw_cuts(data, k.shape[1], 2)
            ]
            lse = torch.stack([piece.lse for piece in pieces]).logsumexp(0)
            shares = [(piece.lse - lse).exp().transpose(1, 2).unsqueeze(-1) for piece in pieces]
            outs.append(sum(s * piece.out for s, piece in zip(shares, pieces, strict=True)))
            sums.append(lse)
        together, lse = torch.cat(outs, 1), torch.cat(sums, 2)
        torch.testing.assert_close(together, whole.out, **TOLERANCE)
        torch.testing.assert_close(lse, whole.lse, **TOLERANCE)
        gradients = [torch.autograd.grad(weighted(out), leaves) for out in (together, whole.out)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ON_CPU)
def test_queries_before_the_keys_see_nothing(name: str) -> None:
    q, k, v = qkv(2, 6, 3, 4, 2, 16, 16, torch.float32, "cpu")
    with tiles(16, 16):
        out = attention(q, k, v, query_offset=0, key_offset=4, implementation=name)
    assert out[:, :4].eq(0).all() and out[:, 4:].ne(0).all()


def by_definition(q, k, v, scale, softcap, window):
    """One sequence of flash_attn, q [Sq, H, D]: the last query stands at the last key."""
    call = AttentionCall(
        Slices.of(q.shape[0], k.shape[0]),
        scale,
        window=None if window[0] < 0 else window[0] + 1,
        softcap=softcap or None,
    )
    return reference.run(*(t.unsqueeze(0) for t in (q, k, v)), call).out.squeeze(0)


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """The signature of flash-attn 2.6 (flash_attn/flash_attn_interface.py)."""
    assert causal and window_size[1] in (-1, 0)
    return torch.stack(
        [
            by_definition(*row, softmax_scale, softcap, window_size)
            for row in zip(q, k, v, strict=True)
        ]
    )


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """The signature of flash-attn 2.6; q [total, H, D]."""
    assert causal and window_size[1] in (-1, 0)
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q.is_contiguous() and cu_seqlens_k.is_contiguous()
    assert cu_seqlens_q.shape == cu_seqlens_k.shape
    assert cu_seqlens_q[-1] == q.shape[0] and cu_seqlens_k[-1] == k.shape[0]
    assert cu_seqlens_q.diff().max() <= max_seqlen_q and cu_seqlens_k.diff().max() <= max_seqlen_k
    out = torch.full_like(q, torch.nan)
    borders = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
    for (a, c), (b, d) in pairwise(borders):
        assert b >= a and d >= c
        if b > a:
            out[a:b] = by_definition(q[a:b], k[c:d], v[c:d], softmax_scale, softcap, window_size)
    return out


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions of the package's signatures that compute by definition."""
    package = ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]  # a stand-in
    package.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1),
):  # fmt: skip
    """The signature of torch 2.11, which has no grouped queries."""
    assert query.shape[1] == key.shape[1] == value.shape[1] and return_aux is None
    return flash_attn_varlen_func(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k,
        softmax_scale=scale, causal=window_size[1] == 0, window_size=window_size,
    )  # fmt: skip


def grouped_varlen_attn(*args, enable_gqa=False, **options):
    """The signature of torch 2.12 and later."""
    assert enable_gqa == (args[0].shape[1] != args[1].shape[1])
    return flash_attn_varlen_func(
        *args,
        softmax_scale=options["scale"],
        causal=options["window_size"][1] == 0,
        window_size=options["window_size"],
    )


SIGNATURE = signature(torch_varlen.varlen_attn)
grouped_varlen_attn.__signature__ = SIGNATURE  # type: ignore[attr-defined]


@pytest.mark.usefixtures("flash_attn")
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("queries", "keys"), [(12, 12), (4, 9), (1, 12)])
@pytest.mark.parametrize("packed", [False, True])
def test_arguments_of_flash_attn(
    window: int | None, softcap: float | None, queries: int, keys: int, packed: bool
) -> None:
    check_arguments(flash.run, window, softcap, queries, keys, packed)


@pytest.mark.parametrize("function", [varlen_attn, grouped_varlen_attn])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("queries", "keys"), [(12, 12), (4, 9), (1, 12)])
@pytest.mark.parametrize("packed", [False, True])
def test_arguments_of_torchs_varlen_attention(
    function: Callable[..., Tensor],
    window: int | None,
    queries: int,
    keys: int,
    packed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch_varlen, "varlen_attn", function)
    check_arguments(flash.run_torch, window, None, queries, keys, packed)


def test_varlen_attention_without_windows_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        raise AssertionError

    monkeypatch.setattr(torch_varlen, "varlen_attn", of_torch_2_10)
    with pytest.raises(ValueError, match="has no scale and no window"):
        choose_attention("varlen", "cuda")
    assert choose_attention("auto", "cuda", {"documents"}).name == "flex"


def check_arguments(
    run: Callable[..., AttentionOutput],
    window: int | None,
    softcap: float | None,
    queries: int,
    keys: int,
    packed: bool,
) -> None:
    """Whole rows, and slices whose queries end with the keys."""
    ids = torch.tensor([[0] * 3 + [1] * 5 + [2] * 4, [0] * 7 + [1] * 5])
    documents = PackedDocuments(ids, starts_of(ids, 8)) if packed else None
    q, k, v = qkv(2, 12, 12, 4, 2, 16, 16, torch.float32, "cpu")
    first = min(2, 12 - keys)
    slices = Slices.of(queries, keys, key_offset=first)
    q = q[:, slices.query_offset : slices.query_offset + queries]
    k, v = (t[:, first : first + keys] for t in (k, v))
    call = AttentionCall(slices, 0.3, documents, window, softcap)
    expected = attention(
        q,
        k,
        v,
        query_offset=slices.query_offset,
        key_offset=first,
        documents=documents,
        window=window,
        softcap=softcap,
        scale=0.3,
        implementation="reference",
    )
    torch.testing.assert_close(run(q, k, v, call).out, expected, **TOLERANCE)


def test_the_starts_of_documents_are_those_of_the_batch() -> None:
    """They are passed on unchanged: their number is bounded, and the host reads nothing."""
    ids = torch.tensor([[0, 0, 1], [0, 0, 0]])
    cu_seqlens = starts_of(ids, 4)
    documents = PackedDocuments(ids, cu_seqlens)
    assert all(starts is cu_seqlens for starts in documents.cu_seqlens(Slices.of(3, 3)))
    last_two = documents.cu_seqlens(Slices.of(2, 2, query_offset=1, key_offset=1))
    assert last_two[0].tolist() == [0, 1, 2, 4, 4] == last_two[1].tolist()


def test_unsupported_arguments_of_flash_attn_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for feature in ("offsets", "documents without cu_seqlens", "sinks"):
        with pytest.raises(ValueError, match=f"it has no {feature}"):
            choose_attention("flash_attn", "cuda", {feature})
