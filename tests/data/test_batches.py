"""Batches: collation of sequences into tensors of one shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.format import PADDING
from data_prep.mds import StoredSequence
from kernels.attention import PackedDocuments, PackedSequences
from kernels.attention.intervals import Slices
from nextpt.base.errors import DataError
from nextpt.data.batch import IGNORE_INDEX, Batch, collate, padding_sequence, segments_per_sequence
from nextpt.data.loader import Loader
from nextpt.evaluate.metrics import DomainSums
from tests.support.datasets import tiny
from tests.support.layouts import rewrite

X = IGNORE_INDEX
SIZES = np.array([0, 1, 2, 3, 4, 0, 0, 0, 0, 0], dtype=np.int32)
WEIGHTS = np.array([1.0, 2.0], dtype=np.float32)


def make(sequences: list[StoredSequence], context: int | None = None) -> Batch:
    length = len(sequences[0].tokens) - 1
    (batch,) = collate(
        sequences,
        len(sequences),
        SIZES,
        WEIGHTS,
        numbers=range(len(sequences)),
        segments=segments_per_sequence(length, context or length),
        context=context or length,
    )
    return batch


def test_a_batch_has_what_its_sequence_has() -> None:
    tokens = np.array([9, 1, 2, 9, 9, 3, 4, 0, 0])
    batch = make(
        [
            StoredSequence(
                tokens,
                np.array([4, 3, 2]),
                np.array([0, 2, PADDING]),
                1,
                np.arange(9, dtype=np.float32),
            )
        ]
    )
    assert batch.tokens.tolist() == [[9, 1, 2, 9, 9, 3, 4, 0]]
    assert batch.targets.tolist() == [[1, 2, 9, X, 3, 4, X, X]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 0, 1, 1, 1, -1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 8, 8, 8, 8]
    assert batch.target_bytes.tolist() == [[1, 2, 0, 0, 3, 4, 0, 0]]
    assert batch.is_text.tolist() == [[True, True, False, False, True, True, False, False]]
    assert batch.token_weights.tolist() == [[2.0, 4.0, 6.0, 0.0, 10.0, 12.0, 0.0, 0.0]]
    assert batch.domain_ids.tolist() == [1] and batch.document_ids.dtype == torch.int32


def test_a_shorter_context_cuts_attention_and_no_target() -> None:
    tokens = np.array([9, 1, 2, 9, 9, 3, 4, 0, 0])
    sequence = StoredSequence(tokens, np.array([4, 3, 2]), np.array([0, 2, PADDING]), 0)
    whole, cut = make([sequence]), make([sequence], context=3)
    assert cut.document_ids.tolist() == [[0, 0, 0, 1, 2, 2, 3, -1]]
    assert cut.position_ids.tolist() == [[0, 1, 2, 0, 0, 1, 0, 0]]
    assert cut.cu_seqlens.tolist()[:7] == [0, 3, 4, 6, 7, 8, 8]
    for name in ("tokens", "targets", "token_weights", "target_bytes", "is_text"):
        assert torch.equal(getattr(whole, name), getattr(cut, name))


def test_bytes_come_from_the_column_where_sequences_have_one() -> None:
    """A text token may have no bytes, and the end of a document may have some."""
    sequence = StoredSequence(
        np.array([9, 1, 2, 9, 0]),
        np.array([4, 1]),
        np.array([0, PADDING]),
        0,
        None,
        np.array([0, 0, 5, 2, 0], dtype=np.uint32),
    )
    batch = make([sequence, padding_sequence(5, 0)])
    assert batch.target_bytes.tolist() == [[0, 5, 2, 0], [0] * 4]
    assert batch.is_text.tolist() == [[True, True, False, False], [False] * 4]
    assert batch.targets.tolist() == [[1, 2, 9, X], [X] * 4]


@st.composite
def sequences(draw: st.DrawFn) -> tuple[list[StoredSequence], int]:
    length = draw(st.integers(2, 30))
    stored = []
    for _ in range(draw(st.integers(1, 4))):
        lengths, remaining = [], length + 1
        while remaining:
            lengths.append(min(draw(st.integers(1 if remaining < 3 else 2, length + 1)), remaining))
            remaining -= lengths[-1]
        flags = np.zeros(len(lengths), np.uint8)
        flags[-1] = draw(st.sampled_from([0, PADDING]))
        stored.append(
            StoredSequence(
                np.array(
                    draw(st.lists(st.integers(0, 9), min_size=length + 1, max_size=length + 1)),
                    np.uint16,
                ),
                np.array(lengths, np.uint32),
                flags,
                draw(st.integers(0, 1)),
            )
        )
    return stored, draw(st.integers(1, length + 3))


@pytest.mark.thorough
@settings(max_examples=200, deadline=None)
@given(sequences())
def test_batches_follow_their_definition(case: tuple[list[StoredSequence], int]) -> None:
    """Against a loop over tokens, and attention's packing of either description."""
    stored, context = case
    length = len(stored[0].tokens) - 1
    batch = make(stored, context)
    for i, sequence in enumerate(stored):
        piece = np.repeat(np.arange(len(sequence.doc_lens)), sequence.doc_lens)
        padding = np.repeat(sequence.doc_flags, sequence.doc_lens) > 0
        number = position = -1
        for t in range(length):
            new = t == 0 or piece[t] != piece[t - 1] or t % context == 0
            number, position = number + new, 0 if new else position + 1
            predicted = piece[t] == piece[t + 1] and not padding[t]
            assert int(batch.targets[i, t]) == (sequence.tokens[t + 1] if predicted else X)
            assert int(batch.document_ids[i, t]) == (-1 if padding[t] else number)
            assert padding[t] or int(batch.position_ids[i, t]) == position
            assert float(batch.token_weights[i, t]) == predicted * WEIGHTS[sequence.domain]
            assert int(batch.target_bytes[i, t]) == predicted * SIZES[sequence.tokens[t + 1]]
            assert bool(batch.is_text[i, t]) == (predicted and SIZES[sequence.tokens[t + 1]] > 0)
    assert (
        batch.cu_seqlens.shape == (len(stored) * segments_per_sequence(length, context) + 1,)
        and batch.cu_seqlens.dtype == torch.int32
    )
    if context >= length:  # else padding is cut in cu_seqlens and is one run in document_ids
        total = len(stored) * length
        sequences = PackedSequences(batch.cu_seqlens, batch.cu_seqlens, total, total)
        mask = sequences.mask(Slices.of(total, total), None)[0, 0]
        by_ids = PackedDocuments(batch.document_ids).mask(Slices.of(length, length), None)[:, 0]
        assert torch.equal(mask, torch.block_diag(*by_ids.int()).bool())


@pytest.mark.thorough
@settings(max_examples=50, deadline=None)
@given(sequences(), st.integers(1, 3))
def test_batches_collated_together_equal_batches_collated_apart(
    case: tuple[list[StoredSequence], int], times: int
) -> None:
    stored, context = case
    options = {
        "segments": segments_per_sequence(len(stored[0].tokens) - 1, context),
        "context": context,
    }
    numbers = [*range(len(stored))]
    together = collate(
        stored * times, len(stored), SIZES, WEIGHTS, numbers=numbers * times, **options
    )
    assert len(together) == times
    for batch in (
        *together,
        *(
            b
            for number, sequence in enumerate(stored)
            for b in collate([sequence], 1, SIZES, WEIGHTS, numbers=[number], **options)
        ),
    ):
        assert all(tensor.is_contiguous() for tensor in vars(batch).values())
    assert all(
        torch.equal(a, b)
        for batch in together
        for a, b in zip(vars(batch).values(), vars(make(stored, context)).values(), strict=True)
    )


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        (
            StoredSequence(np.array([9, 1, 2]), np.array([2, 2]), np.array([0, 0]), 0),
            "do not add up",
        ),
        (StoredSequence(np.array([9, 1, 2]), np.array([3]), np.array([0, 0]), 0), "do not add up"),
        (
            StoredSequence(np.array([9, 1, 2]), np.array([0, 3]), np.array([0, 0]), 0),
            "do not add up",
        ),
        (
            StoredSequence(np.array([9, 1, 10]), np.array([3]), np.array([0]), 0),
            "outside the vocabulary",
        ),
        (
            StoredSequence(np.array([10, 1, 1]), np.array([3]), np.array([0]), 0),
            "outside the vocabulary",
        ),
    ],
)
def test_inconsistent_sequences_are_refused(sequence: StoredSequence, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make([sequence])


def test_segments_beyond_the_capacity_are_refused() -> None:
    sequence = StoredSequence(
        np.array([9, 1, 2, 3, 1, 1, 1, 1, 1]), np.ones(9, np.uint32), np.zeros(9, np.uint8), 0
    )
    with pytest.raises(DataError, match="segments"):
        make([sequence])
    assert (
        segments_per_sequence(64, 64, most=5) == 5
        and segments_per_sequence(64, 16, most=5) == 8
        and segments_per_sequence(64, 1) == 64
    )


def test_the_capacity_of_a_real_dataset_fits_its_fullest_sequence(
    dataset: Path,
) -> None:
    loader = Loader(tiny(dataset, Path("unused")), 0, 1)
    most = max(
        len(sequences[i].doc_lens)
        for split in ("train", "validation")
        for sequences in loader.dataset.sequences[split]
        for i in range(len(sequences))
    )
    assert loader.dataset.max_segments() == most < 64 // 2
    assert loader.step_batches(0)[0].cu_seqlens.shape == (2 * most + 1,)
    loader.close()


@pytest.mark.thorough
@pytest.mark.parametrize("context", [64, 10])
def test_one_epoch_has_every_byte_and_every_token_once(dataset: Path, context: int) -> None:
    stage = {"sequence_length": context}
    rows_of_all = {"global_batch_size": 1, "micro_batch_size": 1}
    loader = Loader(
        tiny(
            dataset,
            Path("unused"),
            data={"stages": [stage], "mixing": {"code": 1.0}},
            train=rows_of_all,
        ),
        0,
        1,
    )
    counts = loader.manifest.splits["train"]["code"]
    batches = [loader.step_batches(step)[0] for step in range(counts.sequences)]
    assert sum(int(b.target_bytes.sum()) for b in batches) == counts.bytes
    assert sum(int((b.targets != X).sum()) for b in batches) == counts.tokens
    assert sum(int(b.is_text.sum()) for b in batches) == counts.text_tokens
    assert max(int(b.position_ids.max()) for b in batches) == context - 1
    loader.close()


@pytest.mark.thorough
def test_bytes_of_a_column_reach_the_metrics(dataset: Path, tmp_path: Path) -> None:
    """Every token has its predecessor's bytes: the first of a document none, its end some."""
    table = np.load(dataset / "token_bytes.npy").astype(np.uint32)

    def later(sample: dict) -> dict:
        own = table[sample["tokens"]]
        starts = np.cumsum(sample["doc_lens"]) - sample["doc_lens"]
        moved = np.concatenate(([0], own[:-1])).astype(np.uint32)
        moved[starts] = 0
        return sample | {"target_bytes": moved}

    folder = rewrite(dataset, tmp_path / "d", byte_counts="column", change=later)
    loader = Loader(tiny(folder, Path("unused")), 0, 1)
    sums, differ, predicted = DomainSums(loader.domains, torch.device("cpu")), 0, 0
    sequences = loader.dataset.sequences["validation"][0]
    for number, batch in enumerate(loader.validation_batches(0, len(sequences))):
        expected = np.zeros((2, 64), np.int64)
        for i in range(min(2, len(sequences) - 2 * number)):
            expected[i] = later(
                {
                    "tokens": sequences[2 * number + i].tokens,
                    "doc_lens": sequences[2 * number + i].doc_lens,
                }
            )["target_bytes"][1:]
        np.testing.assert_array_equal(
            batch.target_bytes.numpy(), np.where(batch.targets != X, expected, 0)
        )
        assert torch.equal(
            batch.is_text,
            (batch.targets != X)
            & (torch.from_numpy(table.astype(np.int64))[batch.targets.clamp(min=0)] > 0),
        )
        sums.add(
            torch.ones_like(batch.token_weights),
            batch.target_bytes,
            batch.is_text,
            batch.domain_ids,
        )
        differ, predicted = (
            differ + int((batch.is_text != (batch.target_bytes > 0)).sum()),
            predicted + int((batch.targets != X).sum()),
        )
    total = sums.total()
    assert (
        differ
        and total.tokens < predicted
        and total.tokens == loader.manifest.splits["validation"]["code"].text_tokens
    )
    loader.close()


def test_validation_sequences_have_every_byte_once(dataset: Path) -> None:
    loader = Loader(
        tiny(dataset, Path("unused"), train={"global_batch_size": 1, "micro_batch_size": 1}), 0, 1
    )
    counts = loader.manifest.splits["validation"]
    for domain, name in enumerate(loader.domains):
        batches = list(loader.validation_batches(domain, 10**9))
        assert sum(int(b.target_bytes.sum()) for b in batches) == counts[name].bytes
    loader.close()


def test_ranks_share_validation_sequences_without_counting_any_twice(dataset: Path) -> None:
    config = tiny(dataset, Path("unused"), train={"global_batch_size": 12, "micro_batch_size": 2})
    whole = sum(int(b.target_bytes.sum()) for b in Loader(config, 0, 1).validation_batches(0, 7))
    parts = [list(Loader(config, rank, 3).validation_batches(0, 7)) for rank in range(3)]
    assert len({len(p) for p in parts}) == 1
    assert sum(int(b.target_bytes.sum()) for p in parts for b in p) == whole
