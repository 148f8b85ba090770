"""Shard format: the files of a dataset folder and the meaning of a sequence.

    DATA/dataset.json                   the manifest below; written last, so a folder without it is
                                        unfinished
    DATA/tokenizer.json                 the tokenizer that made the tokens
    DATA/token_bytes.npy                uint16 [V]: UTF-8 bytes of each token; 0 says that a token
                                        is no text (special, or a hole)
    DATA/{train,validation}/DOMAIN/     index.json of an MDS stream, and its shards in folders,
                                        gNNNNN/shard.NNNNN.mds[.zstd]
    DATA/validation_text/DOMAIN.jsonl   the held-out documents themselves
    DATA/quarantine.jsonl               records that could not be used: file, position, reason; only
                                        when there are any
    DATA/report.{json,html}             counts, lengths, packing, duplicates, throughput

A sequence has sequence_length + 1 tokens: T inputs and, shifted by one, T targets. A document is
stored as [start] + tokens + [end]; one longer than a sequence is cut into pieces that overlap by
one token, so that every token is the target exactly once. A sequence consists of segments: pieces
of documents, and perhaps padding at its end.

Bytes. With byte-level tokenizers a token stands for the same bytes everywhere (token_bytes.npy;
byte_counts "table"). With others (normalisation, SentencePiece, WordPiece) that depends on its
context; then byte_counts is "column", sequences have `target_bytes`, and the table only tells
text from special tokens. Either way the bytes of all targets of a document sum to the UTF-8 bytes
of its text.

A shard may also have `token_weights` (ndarray:float32:T+1): a factor on each token's loss when it
is the target, used where objective.token_weights is set.

Format version 2 has other names for the same: the split `heldout` and its folders `heldout` and
`heldout_text`, `heldout_fraction`, and `rows` for sequences. It is read too.

`data_prep/mds.py` knows how these columns lie in a shard file.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from nextpt.base.errors import DataPrepError, first_problem
from nextpt.base.files import canonical_json, sha256_file

FORMAT_VERSION = 3
SPLITS = ("train", "validation")
_VERSION_2_SPLITS = {"train": "train", "validation": "heldout"}

# Bits of doc_flags, one byte per segment of a sequence.
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
    """MDS columns of a sequence: name -> encoding.

    doc_lens and doc_flags have one entry per segment; the lengths sum to the sequence's.
    target_bytes (only with byte_counts "column") is the number of UTF-8 bytes that each token
    stands for where it is the target, and text_bytes is their sum over the sequence's targets.
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
        sequences: Packed sequences.
        padding_tokens: Tokens of padding in all sequences.
        max_segments: Largest number of segments of any sequence, padding included; None where the
            writer did not record it.
        index_sha256: Hash of index.json; empty without sequences.
    """

    documents: NonNegativeInt
    bytes: NonNegativeInt
    tokens: NonNegativeInt
    text_tokens: NonNegativeInt
    sequences: NonNegativeInt
    padding_tokens: NonNegativeInt
    max_segments: NonNegativeInt | None = None
    index_sha256: str


class DatasetManifest(_Record):
    """Content of dataset.json."""

    format_version: int = FORMAT_VERSION
    sequence_length: PositiveInt
    vocab_size: PositiveInt
    token_dtype: Literal["uint16", "uint32"]
    tokenizer_sha256: str
    token_bytes_sha256: str | None = None  # of the file; None where the writer did not record it
    start_id: int
    end_id: int
    packing: Literal["best_fit", "concat", "single"] = "best_fit"
    byte_counts: Literal["table", "column"] = "table"
    seed: int
    validation_fraction: float
    inputs_sha256: str
    domains: list[str]
    splits: dict[str, dict[str, SplitCounts]]
    fingerprint: str

    @model_validator(mode="after")
    def _counts_of_every_domain(self) -> Self:
        if set(self.splits) != set(SPLITS):
            raise ValueError(f"splits are {', '.join(self.splits)}, expected {', '.join(SPLITS)}")
        for split, domains in self.splits.items():
            if set(domains) != set(self.domains) or len(self.domains) != len(domains):
                raise ValueError(f"splits.{split} has other domains than domains")
        return self

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
            if version not in (2, FORMAT_VERSION):
                newer = isinstance(version, int) and version > FORMAT_VERSION
                fix = "update nextpt, or " if newer else ""
                raise DataPrepError(
                    f"{path} has format version {version}; this nextpt reads 2 and"
                    f" {FORMAT_VERSION}: {fix}prepare the data again"
                )
            manifest = cls.model_validate(_from_version_2(raw) if version == 2 else raw)
        except ValidationError as error:
            raise DataPrepError(
                f"{path} is damaged: {first_problem(error)}; prepare the data again"
            ) from error
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise DataPrepError(f"{path} is damaged: {error}; prepare the data again") from error
        tokenizer = folder / "tokenizer.json"
        if not tokenizer.is_file() or sha256_file(tokenizer) != manifest.tokenizer_sha256:
            raise DataPrepError(
                f"{tokenizer} is not the tokenizer that made these shards (its hash differs):"
                " prepare the data again"
            )
        return manifest

    def split_folder(self, split: str) -> str:
        """Name of the folder of a split's shards; older datasets have another."""
        return _VERSION_2_SPLITS[split] if self.format_version == 2 else split

    @property
    def text_folder(self) -> str:
        """Name of the folder of the held-out documents."""
        return f"{self.split_folder('validation')}_text"

    def content_sha256(self) -> str:
        """Hash of the content: indices hold the hashes of all shards. The origin is left out.

        It is the `fingerprint`, which checkpoints record, so its input has the names of format
        version 2 for good: the same content has the same fingerprint, whichever names a file has.
        token_bytes.npy follows from the tokenizer.
        """
        content = self.model_dump(exclude={"token_bytes_sha256"})
        value = _to_version_2(content) | {"fingerprint": "", "inputs_sha256": ""}
        return sha256(canonical_json(value).encode()).hexdigest()


def _from_version_2(raw: dict[str, Any]) -> dict[str, Any]:
    """Rename the fields and splits of a version 2 manifest."""
    splits = {
        split: {
            domain: _renamed(counts, "rows", "sequences")
            for domain, counts in raw["splits"][name].items()
        }
        for split, name in _VERSION_2_SPLITS.items()
    }
    return _renamed(raw, "heldout_fraction", "validation_fraction") | {"splits": splits}


def _to_version_2(value: dict[str, Any]) -> dict[str, Any]:
    """Reverse of `_from_version_2`."""
    splits = {
        name: {
            domain: _renamed(counts, "sequences", "rows")
            for domain, counts in value["splits"][split].items()
        }
        for split, name in _VERSION_2_SPLITS.items()
    }
    renamed = _renamed(value, "validation_fraction", "heldout_fraction")
    return renamed | {"splits": splits, "format_version": 2}


def _renamed(value: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """A copy with one key renamed. Raises KeyError where it is missing."""
    return {key: item for key, item in value.items() if key != old} | {new: value[old]}
