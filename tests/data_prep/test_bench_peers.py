"""The benchmark's peers do the whole work: all three write the tokenizer's tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zstandard

from bench import data_prep_peers as peers
from data_prep.tokenizer import Tokenizer
from tests.data_prep.test_export import read_pair


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[Path, list[str]]:
    texts = [f"document {i}: " + "naïve words, 漢字\n" * (i % 17) for i in range(300)]
    raw = "".join(
        json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)
    ).encode()
    (tmp_path / "corpus.jsonl.zst").write_bytes(zstandard.compress(raw.rstrip(b"\n")))
    return tmp_path / "corpus.jsonl.zst", texts


@pytest.mark.thorough
def test_the_peers_write_all_tokens(
    corpus: tuple[Path, list[str]], dataset: Path, tmp_path: Path
) -> None:
    file, texts = corpus
    tokenizer = Tokenizer(dataset / "tokenizer.json")
    expected = [np.append(tokenizer.encode(text), tokenizer.end_id) for text in texts]
    stream = np.concatenate(expected)

    assert peers.megatron(file, dataset / "tokenizer.json", tmp_path / "megatron") == len(stream)
    assert all(
        map(
            np.array_equal, read_pair(str(tmp_path / "megatron" / "corpus_text_document")), expected
        )
    )

    assert peers.datatrove(
        file, dataset / "tokenizer.json", tmp_path / "datatrove", batch_size=128
    ) == len(stream)
    data = np.fromfile(tmp_path / "datatrove" / "00000_00000_doc_shuffled.ds", "<u2")
    ends = np.fromfile(tmp_path / "datatrove" / "00000_00000_doc_shuffled.ds.index", "<u8").astype(
        int
    )
    documents = np.split(data, ends[:-1])
    assert ends[-1] == len(data) and sorted(d.tolist() for d in documents) == sorted(
        w.tolist() for w in expected
    )

    rows = len(stream) // 64
    assert (
        peers.llm_foundry(file, dataset / "tokenizer.json", tmp_path / "foundry", max_length=64)
        == 64 * rows
    )
    from streaming import LocalDataset

    chunks = [
        sample["tokens"]
        for sample in map(LocalDataset(str(tmp_path / "foundry")).__getitem__, range(rows))
    ]
    assert chunks[0].dtype == np.int32 and np.array_equal(
        np.concatenate(chunks), stream[: 64 * rows]
    )
