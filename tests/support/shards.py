"""Dataset folders of version 2, written sequence by sequence with exact bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.format import (
    PADDING,
    STARTS_MID_DOCUMENT,
    DatasetManifest,
    SplitCounts,
    columns,
    token_dtype,
)
from data_prep.streaming_compat import import_streaming
from nextpt.base.files import canonical_json, sha256_file


def write_dataset(
    folder: Path,
    domains: dict[str, Sequence[dict[str, Any]]],
    *,
    start_id: int,
    end_id: int,
    vocab_size: int,
    compression: str | None = None,
    size_limit: int = 2**26,
) -> Path:
    """A dataset without a validation split, one group of shards per domain.

    domains: training sequences as (tokens, doc_lens, doc_flags) lists.

    Its tokenizer.json is no tokenizer: nothing that reads it may be tested with this.
    """
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    np.save(folder / "token_bytes.npy", np.ones(vocab_size, dtype=np.uint16))
    length = len(next(iter(domains.values()))[0]["tokens"]) - 1
    splits: dict[str, dict[str, SplitCounts]] = {"train": {}, "validation": {}}
    for number, (name, sequences) in enumerate(sorted(domains.items())):
        index = _write_sequences(
            folder / "train" / name,
            sequences,
            number,
            columns(length, vocab_size),
            compression,
            size_limit,
        )
        splits["train"][name] = _counts(sequences, sha256_file(index))
        splits["validation"][name] = _counts([], "")
    manifest = DatasetManifest(
        sequence_length=length,
        vocab_size=vocab_size,
        token_dtype=token_dtype(vocab_size).name,
        start_id=start_id,
        end_id=end_id,
        tokenizer_sha256=sha256_file(folder / "tokenizer.json"),
        seed=0,
        validation_fraction=0.0,
        inputs_sha256="",
        domains=sorted(domains),
        splits=splits,
        fingerprint=sha256_file(folder / "token_bytes.npy"),
    )
    (folder / "dataset.json").write_text(canonical_json(manifest.model_dump()))
    return folder


def _write_sequences(
    folder: Path,
    sequences: Sequence[dict[str, Any]],
    domain: int,
    layout: dict[str, str],
    compression: str | None,
    size_limit: int,
) -> Path:
    import_streaming()
    from streaming import MDSWriter

    dtype = np.dtype(layout["tokens"].split(":")[1])
    with MDSWriter(
        columns=layout,
        out=str(folder / "g00000"),
        hashes=["xxh64"],
        compression=compression,
        size_limit=size_limit,
    ) as writer:
        for sequence in sequences:
            writer.write(
                {
                    "tokens": np.array(sequence["tokens"], dtype),
                    "doc_lens": np.array(sequence["doc_lens"], np.uint32),
                    "doc_flags": np.array(sequence["doc_flags"], np.uint8),
                    "domain": np.uint16(domain),
                    "text_bytes": np.uint32(
                        sum(
                            n - 1
                            for n, f in zip(
                                sequence["doc_lens"], sequence["doc_flags"], strict=True
                            )
                            if not f & PADDING
                        )
                    ),
                }
            )
    index_path = folder / "g00000" / "index.json"
    entries = json.loads(index_path.read_text())
    index_path.unlink()
    for data in (
        part
        for shard in entries["shards"]
        for part in (shard["raw_data"], shard["zip_data"])
        if part
    ):
        data["basename"] = f"g00000/{data['basename']}"
    (folder / "index.json").write_text(json.dumps(entries))
    return folder / "index.json"


def _counts(sequences: Sequence[dict[str, Any]], index_sha256: str) -> SplitCounts:
    segments = [
        (n, f)
        for sequence in sequences
        for n, f in zip(sequence["doc_lens"], sequence["doc_flags"], strict=True)
    ]
    pieces = [(n, f) for n, f in segments if not f & PADDING]
    tokens = sum(n - 1 for n, _ in pieces)
    return SplitCounts(
        documents=sum(not f & STARTS_MID_DOCUMENT for _, f in pieces),
        bytes=tokens,
        tokens=tokens,
        text_tokens=tokens,
        sequences=len(sequences),
        padding_tokens=sum(n for n, f in segments if f & PADDING),
        index_sha256=index_sha256,
    )
