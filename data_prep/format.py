"""Shard format: the files of a dataset folder and the meaning of a row.

    DATA/dataset.json              the manifest below; written last, so a folder without it is
                                   unfinished
    DATA/tokenizer.json            the tokenizer that made the tokens
    DATA/token_bytes.npy           uint16 [V]: UTF-8 bytes of each token; 0 says that a token is
                                   no text (special, or a hole)
    DATA/{train,heldout}/DOMAIN/   index.json of an MDS stream, and its shards in folders,
                                   gNNNNN/shard.NNNNN.mds[.zstd]
    DATA/heldout_text/DOMAIN.jsonl the held-out documents themselves
    DATA/quarantine.jsonl          records that could not be used: file, place, reason; only when
                                   there are any
    DATA/report.{json,html}        counts, lengths, packing, duplicates, throughput

A row (a packed sequence) has sequence_length + 1 tokens: T inputs and, shifted by one, T targets. A
document is stored as [start] + tokens + [end]; one longer than a row is cut into pieces that
overlap by one token, so that every token is the target exactly once. A row consists of segments:
pieces of documents, and perhaps padding at its end.

Bytes. With byte-level tokenizers a token stands for the same bytes everywhere (token_bytes.npy;
byte_counts "table"). With others (normalisation, SentencePiece, WordPiece) that depends on its
context; then byte_counts is "column", rows have `target_bytes`, and the table only tells text from
special tokens. Either way the bytes of all targets of a document sum to the UTF-8 bytes of its
text.

A shard may also have `token_weights` (ndarray:float32:T+1): a factor on each token's loss when it
is the target, used where objective.token_weights is set.

`data_prep/mds.py` knows how these columns lie in a shard file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from nextpt.base.errors import DataPrepError
from nextpt.base.files import sha256_file

FORMAT_VERSION = 2
SPLITS = ("train", "heldout")

# Bits of doc_flags, one byte per segment of a row.
STARTS_MID_DOCUMENT = 1
ENDS_MID_DOCUMENT = 2
PADDING = 4


def token_dtype(vocab_size: int) -> np.dtype:
    """Smallest unsigned type that holds every token id.

    Raises:
        DataPrepError: Above 2^32 tokens.
    """
    if vocab_size <= 2**16:
        return np.dtype(np.uint16)
    if vocab_size <= 2**32:
        return np.dtype(np.uint32)
    raise DataPrepError(
        f"a vocabulary of {vocab_size} tokens does not fit uint32, the widest token type of the"
        " shards"
    )


def columns(sequence_length: int, vocab_size: int, byte_counts: str = "table") -> dict[str, str]:
    """MDS columns of a row: name -> encoding.

    doc_lens and doc_flags have one entry per segment; the lengths sum to the row's. target_bytes
    (only with byte_counts "column") is the number of UTF-8 bytes that each token stands for where
    it is the target, and text_bytes is their sum over the row's targets.
    """
    layout = {
        "tokens": f"ndarray:{token_dtype(vocab_size)}:{sequence_length + 1}",
        "doc_lens": "ndarray:uint32",
        "doc_flags": "ndarray:uint8",
        "domain": "uint16",
        "text_bytes": "uint32",
    }
    if byte_counts == "column":
        layout["target_bytes"] = f"ndarray:uint32:{sequence_length + 1}"
    return layout


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SplitCounts(_Record):
    """Counts of one domain of one split.

    Attributes:
        documents: Documents.
        bytes: UTF-8 bytes of their texts.
        tokens: Targets that are predicted, the ends of documents included.
        text_tokens: Targets that stand for text.
        rows: Rows (packed sequences).
        padding_tokens: Tokens of padding in all rows.
        max_segments: Largest number of segments of any row, padding included; None where the writer
            did not record it.
        index_sha256: Hash of index.json; empty without rows.
    """

    documents: int
    bytes: int
    tokens: int
    text_tokens: int
    rows: int
    padding_tokens: int
    max_segments: int | None = None
    index_sha256: str


class DatasetManifest(_Record):
    """Content of dataset.json."""

    format_version: int = FORMAT_VERSION
    sequence_length: int
    vocab_size: int
    token_dtype: Literal["uint16", "uint32"]
    tokenizer_sha256: str
    start_id: int
    end_id: int
    packing: Literal["best_fit", "concat", "single"] = "best_fit"
    byte_counts: Literal["table", "column"] = "table"
    seed: int
    heldout_fraction: float
    inputs_sha256: str
    domains: list[str]
    splits: dict[str, dict[str, SplitCounts]]
    fingerprint: str

    @classmethod
    def load(cls, folder: Path) -> DatasetManifest:
        """Read and check the manifest of a dataset folder.

        Raises:
            DataPrepError: When the folder is unfinished, damaged, of another format version, or has
                another tokenizer than the one that made the shards.
        """
        path = folder / "dataset.json"
        if not path.is_file():
            state = (
                "is not there"
                if not folder.exists()
                else "has no dataset.json, so it is not a finished dataset"
            )
            raise DataPrepError(
                f"dataset folder {folder} {state}; make it with: nextpt prep shards --output"
                f" {folder}"
            )
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            version = raw.get("format_version")
            if version != FORMAT_VERSION:
                raise DataPrepError(
                    f"{path} has format version {version}; this nextpt reads {FORMAT_VERSION}:"
                    " prepare the data again"
                )
            manifest = cls.model_validate(raw)
        except (ValueError, AttributeError, ValidationError) as error:
            raise DataPrepError(
                f"{path} is damaged: {str(error).splitlines()[0]}; prepare the data again"
            ) from error
        tokenizer = folder / "tokenizer.json"
        if not tokenizer.is_file() or sha256_file(tokenizer) != manifest.tokenizer_sha256:
            raise DataPrepError(
                f"{tokenizer} is not the tokenizer that made these shards (its hash differs):"
                " prepare the data again"
            )
        return manifest
