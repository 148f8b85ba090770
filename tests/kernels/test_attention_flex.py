"""FlexAttention by our block masks: the same results as the reference, and no compilation anew."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention as torch_flex

from kernels.attention import PackedDocuments, block_mask, flex, reference
from kernels.attention.call import AttentionCall
from kernels.attention.intervals import Slices, causal, of_documents

CPU = torch.device("cpu")
BLOCK = block_mask.BLOCK
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture
def gradients_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch differentiate its plain operations, which it refuses on a CPU."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)


def packed(rows: int, length: int, share: float = 0.03) -> PackedDocuments:
    generator = torch.Generator().manual_seed(length)
    return PackedDocuments(
        (torch.rand(rows, length, generator=generator) < share).cumsum(1).to(torch.int32)
    )


@pytest.mark.usefixtures("gradients_on_cpu")
@pytest.mark.parametrize(
    ("slices", "documents", "options"),
    [
        (Slices.of(300, 300), packed(2, 300), {}),
        (Slices.of(300, 300), packed(2, 300), {"window": 40, "softcap": 2.0}),
        (Slices.of(300, 300), packed(2, 300), {"sinks": True}),
        (Slices.of(130, 200), None, {"window": 50}),
        (Slices.of(1, 140), None, {"sinks": True}),
        (Slices(0, 20, 5, 140), None, {"sinks": True}),  # five queries see nothing
        (Slices(100, 40, 20, 100), packed(2, 150), {}),
    ],
)
def test_equals_the_reference(
    slices: Slices, documents: PackedDocuments | None, options: dict
) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, slices.queries, 4, 16, generator=generator)
    k, v = (torch.randn(2, slices.keys, 2, 16, generator=generator) for _ in range(2))
    sinks = torch.randn(4, generator=generator) if options.get("sinks") else None
    inputs = [t.requires_grad_() for t in (q, k, v, sinks) if t is not None]
    call = AttentionCall(
        slices, 0.25, documents, options.get("window"), options.get("softcap"), sinks
    )
    upstream = torch.randn(2, slices.queries, 4, 16, generator=generator)
    results = []
    for run in (flex.run, reference.run):
        out, lse = run(q, k, v, call)
        results.append((out, lse, *torch.autograd.grad((out * upstream).sum(), inputs)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_blocks_are_those_of_the_dense_mask(data: st.DataObject) -> None:
    """No pair that is seen is left out, and blocks without a mask are seen whole."""
    keys = data.draw(st.integers(1, 600), "keys")
    start = data.draw(st.integers(0, keys - 1), "first query")
    queries = data.draw(st.integers(1, keys - start), "queries")
    window = data.draw(st.none() | st.integers(1, 400), "window")
    slices = Slices(start, queries, 0, keys)
    if data.draw(st.booleans(), "documents"):
        share = data.draw(st.sampled_from([0.002, 0.01, 0.1]), "share")
        intervals = of_documents(packed(2, keys, share).document_ids, slices, window)
    else:
        intervals = causal(slices, window, CPU)
    mask = block_mask.build(intervals)
    room = -queries % BLOCK, -keys % BLOCK
    dense = torch.nn.functional.pad(intervals.mask()[:, 0], (0, room[1], 0, room[0]))
    blocks = dense.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK)).transpose(2, 3)
    seen, whole = blocks.flatten(3).any(-1), blocks.flatten(3).all(-1)
    partial, full = (
        chosen(*numbers)
        for numbers in (
            (mask.kv_num_blocks, mask.kv_indices),
            (mask.full_kv_num_blocks, mask.full_kv_indices),
        )
    )
    assert torch.equal(full, whole)
    assert not (seen & ~(partial | full)).any() and not (partial & full).any()
    q, k = torch.arange(queries)[:, None], torch.arange(keys)
    for row in range(intervals.first.shape[0]):
        rows = torch.tensor(row)
        assert torch.equal(mask.mask_mod(rows, rows, q, k), intervals.mask()[row, 0])


def chosen(counts: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Boolean [R, Qb, Kb] from the counts and numbers of blocks."""
    blocks = torch.zeros(numbers[:, 0].shape, dtype=torch.bool)
    among = torch.arange(numbers.shape[-1]) < counts[:, 0].unsqueeze(-1)
    return blocks.scatter(2, numbers[:, 0].long(), among)


def test_other_documents_are_not_compiled_anew() -> None:
    counter = CompileCounter()
    compiled = torch.compile(torch_flex.flex_attention, backend=counter, dynamic=False)
    q = torch.randn(2, 2, 256, 16)
    for share in (0.01, 0.1, 0.5):
        call = AttentionCall(Slices.of(256, 256), 0.25, packed(2, 256, share))
        compiled(q, q, q, block_mask=call.block_mask(CPU))
    assert counter.frame_count == 1


def test_layers_share_a_block_mask() -> None:
    documents = packed(1, 256)
    call = AttentionCall(Slices.of(256, 256), 0.25, documents)
    assert call.block_mask(CPU) is call.block_mask(CPU)
    assert call._replace(window=9).block_mask(CPU) is not call.block_mask(CPU)
