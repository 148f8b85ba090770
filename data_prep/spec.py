"""Settings of a preparation: everything but the inputs that a dataset is a function of."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import tiktoken
from pydantic import BaseModel, ConfigDict, field_validator

from data_prep.format import token_dtype
from nextpt.base.errors import DataPrepError
from nextpt.base.files import expand_home

DOMAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
LONGEST_DOCUMENT = 2**32 - 1  # bytes, as data_prep.tokens counts them; it has to fit in memory
# What None for max_bytes is in the hash of settings, which dataset.json records.
HASHED_MAX_BYTES = 2**26


class PrepSpec(BaseModel):
    """Settings of one dataset.

    Attributes:
        domains: Name -> file, folder, glob or URI.
        output: Dataset folder to write.
        sequence_length: Inputs per sequence, tokens.
        vocab_size: Size of a tokenizer to train. Exactly one of vocab_size, tokenizer and
            characters.
        tokenizer: What data_prep.tokenizer.convert reads: a file, a folder, the name of a tiktoken
            encoding.
        characters: Make every character a token.
        encoder: Library that encodes.
        start_token: Special token before each document; by default the tokenizer's own.
        end_token: Special token after each document; by default the tokenizer's own.
        validation_fraction: Share held out for evaluation.
        split: "hash" holds out that share of the documents, by a hash of their text. "tail" holds
            out that share of each domain's characters from its end, cutting the document where it
            begins.
        seed: Of the order of sequences.
        text_field: Key of the text.
        id_field: Key of the id, or None.
        domain_field: Key of the domain in each record; then the names of `domains` name locations
            only.
        packing: "best_fit", "concat" or "single".
        compression: Of shards: zstd, zstd:LEVEL, or None.
        min_bytes: Shorter documents (UTF-8) are filtered out and counted.
        max_bytes: Longer documents (UTF-8) are filtered out and counted; None for no limit.
        duplicates: "drop" keeps the first of documents with the same text.
        max_bad_fraction: Share of bad records above which nothing is written.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    domains: dict[str, str | Path]
    output: Path
    sequence_length: int
    vocab_size: int | None = None
    tokenizer: str | Path | None = None
    characters: bool = False
    encoder: Literal["auto", "tiktoken", "tokenizers"] = "auto"
    start_token: str | None = None
    end_token: str | None = None
    validation_fraction: float = 0.05
    split: str = "hash"
    seed: int = 0
    text_field: str = "text"
    id_field: str | None = "id"
    domain_field: str | None = None
    packing: str = "best_fit"
    compression: str | None = None
    min_bytes: int = 1
    max_bytes: int | None = None
    duplicates: str = "keep"
    max_bad_fraction: float = 1e-4

    @field_validator("tokenizer", "output", mode="before")
    @classmethod
    def _expand_home(cls, path: Any) -> Any:
        return expand_home(str(path)) if path is not None else None

    @property
    def work(self) -> Path:
        """Folder of unfinished work, beside the output, so that shards are only renamed."""
        return self.output.with_name(self.output.name + ".work")

    def check(self) -> None:
        """Check the values.

        Raises:
            DataPrepError: On the first invalid value.
        """
        if not self.domains:
            raise DataPrepError("no corpus given; name at least one as DOMAIN=PATH")
        for name in self.domains:
            check_domain(name)
        if self.sequence_length < 2:
            raise DataPrepError(f"sequence_length = {self.sequence_length} must be at least 2")
        if not 0 <= self.validation_fraction < 1:
            raise DataPrepError(
                f"validation_fraction = {self.validation_fraction} must be at least 0 and below 1"
            )
        if (self.vocab_size is not None) + (self.tokenizer is not None) + self.characters != 1:
            raise DataPrepError(
                "give one of vocab_size, to train a tokenizer, tokenizer, a tokenizer.json, and"
                " characters"
            )
        if (
            self.tokenizer is not None
            and not Path(self.tokenizer).exists()
            and str(self.tokenizer) not in tiktoken.list_encoding_names()
        ):
            raise DataPrepError(
                f"tokenizer {self.tokenizer} does not exist, and tiktoken has no encoding of that"
                " name"
            )
        if self.vocab_size is not None:
            token_dtype(self.vocab_size)
        for key, known in (
            ("split", ("hash", "tail")),
            ("packing", ("best_fit", "concat", "single")),
            ("duplicates", ("keep", "drop")),
        ):
            if getattr(self, key) not in known:
                raise DataPrepError(
                    f"{key} = {getattr(self, key)!r}: expected {', '.join(known[:-1])} or"
                    f" {known[-1]}"
                )
        if self.compression is not None and not re.fullmatch(
            r"zstd(:([1-9]|1\d|2[0-2]))?", self.compression
        ):
            raise DataPrepError(
                f"compression = {self.compression!r}: expected zstd or zstd:LEVEL, LEVEL from 1"
                " to 22"
            )
        longest = LONGEST_DOCUMENT if self.max_bytes is None else self.max_bytes
        if not 1 <= self.min_bytes <= longest <= LONGEST_DOCUMENT:
            raise DataPrepError(
                f"min_bytes = {self.min_bytes} and max_bytes = {self.max_bytes}: expected 1 <="
                f" min_bytes <= max_bytes <= {LONGEST_DOCUMENT}"
            )
        if not 0 <= self.max_bad_fraction <= 1:
            raise DataPrepError(
                f"max_bad_fraction = {self.max_bad_fraction} must be between 0 and 1"
            )
        if self.split == "tail" and (self.domain_field is not None or self.duplicates == "drop"):
            raise DataPrepError(
                "split = 'tail' goes by position, so it takes neither domain_field nor duplicates ="
                " 'drop'"
            )

    def settings(self) -> dict[str, object]:
        """Everything that decides the dataset but its inputs; the output is not part of it."""
        settings: dict[str, object] = json.loads(
            self.model_dump_json(exclude={"output", "domains", "tokenizer"})
        )
        settings["max_bytes"] = settings["max_bytes"] or HASHED_MAX_BYTES
        return settings


def check_domain(name: str) -> str:
    """Return the name if it can name a folder.

    Raises:
        DataPrepError: If it cannot.
    """
    if not DOMAIN_NAME.fullmatch(name) or len(name) > 100:
        raise DataPrepError(f"domain name {name!r}: expected letters, digits, '.', '_' and '-'")
    return name
