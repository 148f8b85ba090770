"""Megatron-LM export, read by a reader written from the published description of the format."""

from __future__ import annotations

import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.export import export_megatron, megatron_dtype
from data_prep.format import ENDS_MID_DOCUMENT, PADDING, STARTS_MID_DOCUMENT, DatasetManifest
from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import DataPrepError
from nextpt.base.files import sha256_file
from tests.support.prep_worlds import lines_of
from tests.support.shards import write_dataset


def read_pair(prefix: str) -> list[np.ndarray]:
    """The sequences of PREFIX.bin/.idx; every byte of both files is accounted for."""
    index, tokens = Path(prefix + ".idx").read_bytes(), Path(prefix + ".bin").read_bytes()
    assert index[:9] == b"MMIDIDX\0\0" and struct.unpack_from("<Q", index, 9) == (1,)
    dtype = {8: "<u2", 4: "<i4"}[index[17]]
    count, entries = struct.unpack_from("<QQ", index, 18)
    lengths = np.frombuffer(index, "<i4", count, 34)
    offsets = np.frombuffer(index, "<i8", count, 34 + 4 * count)
    documents = np.frombuffer(index, "<i8", entries, 34 + 12 * count)
    assert len(index) == 34 + 12 * count + 8 * entries and documents.tolist() == list(
        range(count + 1)
    )
    sequences, at = [], 0
    for length, offset in zip(lengths.tolist(), offsets.tolist(), strict=True):
        assert offset == at
        sequences.append(np.frombuffer(tokens, dtype, length, offset))
        at += sequences[-1].nbytes
    assert at == len(tokens)
    return sequences


@pytest.mark.thorough
def test_documents_of_a_real_dataset_are_exported_unchanged(dataset: Path, tmp_path: Path) -> None:
    exported = export_megatron(dataset, tmp_path / "out" / "stdlib")
    manifest = DatasetManifest.load(dataset)
    assert {(e.split, e.domain) for e in exported} == {
        (s, d) for s in ("train", "validation") for d in ("code", "prose")
    }
    for part in exported:
        counts = manifest.splits[part.split][part.domain]
        sequences = read_pair(str(part.prefix))
        # Every token but the starts once, and one twice for each further piece of a document.
        assert len(sequences) == part.sequences and sum(map(len, sequences)) == part.tokens
        assert part.tokens == counts.tokens + part.sequences - counts.documents
        assert sum(s[-1] == manifest.end_id for s in sequences) == counts.documents
        assert all(manifest.end_id not in s[:-1] for s in sequences)
    # Held-out documents are also stored as text: packing them again must give exactly these
    # sequences.
    tokenizer, length = Tokenizer(dataset / "tokenizer.json"), manifest.sequence_length
    for domain in manifest.domains:
        expected: Counter[bytes] = Counter()
        for line in lines_of(dataset / "validation_text" / f"{domain}.jsonl"):
            document = np.concatenate(
                [[manifest.start_id], tokenizer.encode(json.loads(line)["text"]), [manifest.end_id]]
            ).astype("<u2")
            pieces = [document[at : at + length + 1] for at in range(0, len(document) - 1, length)]
            expected.update(piece.tobytes() for piece in (pieces[0][1:], *pieces[1:]))
        assert (
            Counter(
                s.tobytes()
                for s in read_pair(str(tmp_path / "out" / f"stdlib-{domain}-validation"))
            )
            == expected
        )


# One row of 8 tokens: a document, the end of a longer one, padding. The other: the beginning of the
# longer one.
ROWS = [
    {
        "tokens": [9, 1, 2, 9, 5, 6, 9, 9],
        "doc_lens": [4, 3, 1],
        "doc_flags": [0, STARTS_MID_DOCUMENT, PADDING],
    },
    {"tokens": [9, 3, 4, 3, 4, 3, 4, 5], "doc_lens": [8], "doc_flags": [ENDS_MID_DOCUMENT]},
]


@pytest.mark.parametrize("compression", [None, "zstd:3"])
@pytest.mark.parametrize(
    ("start", "vocab_size", "expected"),
    [
        (9, 65_499, [[1, 2, 9], [5, 6, 9], [3, 4, 3, 4, 3, 4, 5]]),
        (8, 65_500, [[8, 1, 2, 9], [5, 6, 9], [8, 3, 4, 3, 4, 3, 4, 5]]),
    ],
)
def test_each_byte_follows_the_described_format(
    tmp_path: Path, compression: str | None, start: int, vocab_size: int, expected: list[list[int]]
) -> None:
    rows = [
        row
        | {"tokens": [start if i in (0, 8) and t == 9 else t for i, t in enumerate(row["tokens"])]}
        for row in ROWS
    ]
    write_dataset(
        tmp_path / "data",
        {"a.b": rows},
        start_id=start,
        end_id=9,
        vocab_size=vocab_size,
        compression=compression,
    )
    export_megatron(tmp_path / "data", tmp_path / "x")
    code, form = (8, "H") if vocab_size < 65_500 else (4, "i")
    flat = [t for sequence in expected for t in sequence]
    lengths = [len(sequence) for sequence in expected]
    size = struct.calcsize(form)
    offsets = [0, lengths[0] * size, (lengths[0] + lengths[1]) * size]
    assert (tmp_path / "x-a.b-train.bin").read_bytes() == struct.pack(f"<{len(flat)}{form}", *flat)
    index = b"MMIDIDX\0\0" + struct.pack(
        "<QBQQ3i3q4q", 1, code, 3, 4, *lengths, *offsets, 0, 1, 2, 3
    )
    assert (tmp_path / "x-a.b-train.idx").read_bytes() == index
    # No validation sequences, no temporaries
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "data",
        "x-a.b-train.bin",
        "x-a.b-train.idx",
    ]


def test_tables_longer_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"tokens": [9, i, 9, 9, 2, 3, 4, 9], "doc_lens": [3, 5], "doc_flags": [0, 0]}
        for i in range(1, 8)
    ]
    write_dataset(tmp_path / "data", {"a": rows}, start_id=9, end_id=9, vocab_size=10)
    export_megatron(tmp_path / "data", tmp_path / "whole")
    monkeypatch.setattr("data_prep.export.BLOCK", 3)
    export_megatron(tmp_path / "data", tmp_path / "blocks")
    assert (tmp_path / "whole-a-train.idx").read_bytes() == (
        tmp_path / "blocks-a-train.idx"
    ).read_bytes()
    assert [s.tolist() for s in read_pair(str(tmp_path / "blocks-a-train"))][:2] == [
        [1, 9],
        [2, 3, 4, 9],
    ]


def test_the_token_type_is_megatrons_own() -> None:
    assert [megatron_dtype(v) for v in (1, 65_499, 65_500, 2**31)] == ["<u2", "<u2", "<i4", "<i4"]
    with pytest.raises(DataPrepError, match="does not fit int32"):
        megatron_dtype(2**31 + 1)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_dataset(
        tmp_path / "data", {"a": ROWS, "b": ROWS}, start_id=9, end_id=9, vocab_size=10
    )


def test_nothing_is_overwritten(small: Path, tmp_path: Path) -> None:
    (tmp_path / "x-b-train.bin").write_text("mine")
    with pytest.raises(DataPrepError, match=r"x-b-train.bin exists"):
        export_megatron(small, tmp_path / "x")
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == ["data", "x-b-train.bin"]
        and (tmp_path / "x-b-train.bin").read_text() == "mine"
    )


def damage_shard(data: Path) -> str:
    shard = data / "train" / "b" / "g00000" / "shard.00000.mds"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    return "shard.00000.mds is damaged"


def cut_shard(data: Path) -> str:
    shard = data / "train" / "b" / "g00000" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-1])
    return "its index says"


def lose_shard(data: Path) -> str:
    (data / "train" / "b" / "g00000" / "shard.00000.mds").unlink()
    return "shard.00000.mds is missing"


def change_index(data: Path) -> str:
    index = data / "train" / "b" / "index.json"
    index.write_text(index.read_text() + " ")
    return "not the one that dataset.json was written with"


def _edit(data: Path, change: Any) -> None:
    index = data / "train" / "b" / "index.json"
    manifest = json.loads((data / "dataset.json").read_text())
    entries = json.loads(index.read_text())
    change(entries["shards"][0], manifest["splits"]["train"]["b"])
    index.write_text(json.dumps(entries))
    manifest["splits"]["train"]["b"]["index_sha256"] = sha256_file(index)
    (data / "dataset.json").write_text(json.dumps(manifest))


def point_outside(data: Path) -> str:
    _edit(data, lambda shard, counts: shard["raw_data"].update(basename="../../../secret.mds"))
    return "outside its folder: ../../../secret.mds"


def miscount(data: Path) -> str:
    _edit(data, lambda shard, counts: counts.update(tokens=counts["tokens"] + 1))
    return "train/b has 2 documents and 13 tokens to export where dataset.json counts 2 and 14"


@pytest.mark.parametrize(
    "damage", [damage_shard, cut_shard, lose_shard, change_index, point_outside, miscount]
)
def test_a_damaged_dataset_is_refused_and_nothing_left(
    small: Path, tmp_path: Path, damage: Any
) -> None:
    message = damage(small)
    with pytest.raises(DataPrepError) as refused:
        export_megatron(small, tmp_path / "x")
    assert message in str(refused.value)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_a_folder_that_cannot_be_written_is_named(small: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataPrepError, match="file"):
        export_megatron(small, tmp_path / "file" / "x")
