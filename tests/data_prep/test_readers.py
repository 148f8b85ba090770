"""Shards as mosaicml-streaming's two readers and llm-foundry read them.

The expected samples are decoded from the bytes of the shards, by the published layout of MDS:
uint32 samples n, uint32 [n + 1] offsets of the samples; a sample is the uint32 sizes of its columns
of variable size and then all columns, in the order of the index.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.format import DatasetManifest, columns
from data_prep.prepare import prepare
from data_prep.spec import PrepSpec
from data_prep.streaming_compat import import_streaming
from tests.support.commands import run_script


def decode_shards(folder: Path) -> Iterator[dict[str, Any]]:
    """The samples of one MDS folder whose columns are integers and arrays of one dimension."""
    for shard in json.loads((folder / "index.json").read_text())["shards"]:
        data = (folder / shard["raw_data"]["basename"]).read_bytes()
        count = int.from_bytes(data[:4], "little")
        assert count == shard["samples"]
        offsets = np.frombuffer(data, "<u4", count + 1, 4).tolist()
        for begin, end in pairwise(offsets):
            fixed = list(shard["column_sizes"])
            sizes = iter(np.frombuffer(data, "<u4", fixed.count(None), begin).tolist())
            at, sample = begin + 4 * fixed.count(None), {}
            for name, encoding, size in zip(
                shard["column_names"], shard["column_encodings"], fixed, strict=True
            ):
                size = next(sizes) if size is None else size
                sample[name] = _value(encoding, data[at : at + size])
                at += size
            assert at == end
            yield sample


def _value(encoding: str, data: bytes) -> Any:
    kind, *rest = encoding.split(":")
    if kind != "ndarray":
        return int.from_bytes(data, "little")
    if len(rest) == 2:
        return np.frombuffer(data, rest[0])
    # Without a shape in the encoding: a byte, 4 * dimensions + a code for the width of their sizes,
    # then these.
    width = 1 << (data[0] % 4)
    return np.frombuffer(data[1 + width :], rest[0])


def same(actual: dict[str, Any], expected: dict[str, Any]) -> bool:
    return actual.keys() == expected.keys() and all(
        np.array_equal(actual[name], expected[name]) for name in expected
    )


def parts(manifest: DatasetManifest) -> list[tuple[str, str]]:
    return [(split, domain) for split in manifest.splits for domain in manifest.domains]


def test_local_dataset_reads_every_sample(dataset: Path) -> None:
    import_streaming()
    from streaming import LocalDataset

    manifest = DatasetManifest.load(dataset)
    for split, domain in parts(manifest):
        expected = list(decode_shards(dataset / split / domain))
        actual = LocalDataset(str(dataset / split / domain))
        assert len(actual) == len(expected) == manifest.splits[split][domain].sequences > 0
        assert all(same(actual[i], expected[i]) for i in range(len(expected)))
        assert set(expected[0]) == set(
            columns(manifest.sequence_length, manifest.vocab_size, manifest.byte_counts)
        )
        assert sum(row["text_bytes"] for row in expected) == manifest.splits[split][domain].bytes


@pytest.mark.thorough
def test_one_stream_over_several_groups(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of a domain lie in a folder per group under one index.

    Basenames hold a slash, which MDS allows.
    """
    monkeypatch.setattr("data_prep.layout.GROUP_TOKENS", 20_000)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(
        "".join(
            json.dumps({"text": f"{i} " + "word and word " * (i % 40)}) + "\n" for i in range(800)
        )
    )
    prepare(
        PrepSpec(
            domains={"a": corpus},
            output=tmp_path / "data",
            sequence_length=64,
            tokenizer=dataset / "tokenizer.json",
            validation_fraction=0.0,
        )
    )
    folder = tmp_path / "data" / "train" / "a"
    assert (
        len(
            {
                Path(s["raw_data"]["basename"]).parent
                for s in json.loads((folder / "index.json").read_text())["shards"]
            }
        )
        > 2
    )
    import_streaming()
    from streaming import LocalDataset

    actual, expected = LocalDataset(str(folder)), list(decode_shards(folder))
    assert len(actual) == len(expected) and all(
        same(actual[i], expected[i]) for i in range(len(expected))
    )


# Through StreamingDataset itself, in a process of its own: it leaves threads and shared memory
# behind. The class is llm-foundry's convention for tokens (llmfoundry/data/text_data.py,
# StreamingTextDataset): the column is called "tokens", an array of any integer type is cut to
# max_seq_len and given as int64, and the collator stacks such tensors.
READ = """
import sys
import numpy as np, torch
from torch.utils.data import DataLoader
from data_prep.streaming_compat import import_streaming
import_streaming()
from streaming import Stream, StreamingDataset

class Text(StreamingDataset):
    max_seq_len = 50
    def __getitem__(self, index):
        tokens = super().__getitem__(index)["tokens"]
        return torch.from_numpy(tokens[: self.max_seq_len].copy()).to(torch.int64)

root, domains, output = sys.argv[1], sys.argv[2].split(","), sys.argv[3]
common = dict(batch_size=4, num_canonical_nodes=1)
for split in ("train", "validation"):
    streams = lambda: [Stream(local=f"{root}/{split}/{d}", split=None) for d in domains]
    rows = list(StreamingDataset(streams=streams(), shuffle=False, **common))
    shuffling = dict(shuffle_algo="py1e", shuffle_seed=3, shuffle_block_size=64)
    shuffled = list(StreamingDataset(streams=streams(), shuffle=True, **shuffling, **common))
    text = Text(streams=streams(), shuffle=False, **common)
    batches = list(DataLoader(text, batch_size=4, collate_fn=torch.stack))
    assert all(b.dtype == torch.int64 for b in batches)
    names = ("tokens", "doc_lens", "doc_flags")
    np.savez(f"{output}/{split}.npz", input_ids=torch.cat(batches).numpy(),
             shuffled=np.stack([r["tokens"] for r in shuffled]),
             **{name: np.concatenate([r[name] for r in rows]) for name in names},
             **{name: np.array([r[name] for r in rows]) for name in ("domain", "text_bytes")})
"""


@pytest.mark.process
def test_streaming_dataset_and_llm_foundry_read_every_sample(dataset: Path, tmp_path: Path) -> None:
    manifest = DatasetManifest.load(dataset)
    arguments = (str(dataset), ",".join(manifest.domains), str(tmp_path))
    completed = run_script("-c", READ, *arguments)
    assert completed.returncode == 0, completed.stderr
    for split in manifest.splits:
        actual = np.load(tmp_path / f"{split}.npz")
        expected = [
            row for domain in manifest.domains for row in decode_shards(dataset / split / domain)
        ]
        for name in ("tokens", "doc_lens", "doc_flags"):
            assert np.array_equal(actual[name], np.concatenate([row[name] for row in expected])), (
                name
            )
        for name in ("domain", "text_bytes"):
            assert actual[name].tolist() == [row[name] for row in expected], name
        tokens = np.stack([row["tokens"] for row in expected])
        assert np.array_equal(actual["input_ids"], tokens[:, :50].astype(np.int64))
        assert not np.array_equal(actual["shuffled"], tokens)
        assert sorted(map(bytes, actual["shuffled"])) == sorted(map(bytes, tokens))
