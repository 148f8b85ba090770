"""What to prepare: the settings that a dataset is a function of, beside its inputs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

import tiktoken
from pydantic import BaseModel, ConfigDict

from data_prep.format import token_dtype
from nextpt.base.errors import DataPrepError

DOMAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
# bytes; a worker holds a few copies of a document at once and stays below 1 GiB
LONGEST_DOCUMENT = 2**26


class PrepSpec(BaseModel):
    """Settings of one dataset.

    domains: name -> file, folder, glob or URI. One of vocab_size (a tokenizer is trained),
    tokenizer (what data_prep.tokenizer.convert reads: a file, a folder, the name of a tiktoken
    encoding) and characters. sequence_length: inputs per row, tokens. heldout: share kept for
    evaluation. split: "hash" holds out that share of the documents by a hash of their text, "tail"
    that share of each domain's characters from its end, cutting the document where it begins.
    domain_field: key of the domain in each record; then the names of `domains` only name places.
    min_bytes, max_bytes: bounds on a document's UTF-8 bytes; others are passed over and counted.
    duplicates "drop" keeps the first of documents with the same text.
    max_bad_fraction: share of bad records above which nothing is made. seed: order of rows.
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
    heldout: float = 0.05
    split: str = "hash"
    seed: int = 0
    text_field: str = "text"
    id_field: str | None = "id"
    domain_field: str | None = None
    packing: str = "best_fit"
    compression: str | None = None
    min_bytes: int = 1
    max_bytes: int = LONGEST_DOCUMENT
    duplicates: str = "keep"
    max_bad_fraction: float = 1e-4

    @property
    def work(self) -> Path:
        """Folder of unfinished work, beside the output so that finished shards need only be renamed."""
        return self.output.with_name(self.output.name + ".work")

    def check(self) -> None:
        """Raise DataPrepError on the first value that makes no sense."""
        if not self.domains:
            raise DataPrepError("no corpus given; name at least one as DOMAIN=PATH")
        for name in self.domains:
            check_domain(name)
        if self.sequence_length < 2:
            raise DataPrepError(f"sequence_length = {self.sequence_length} must be at least 2")
        if not 0 <= self.heldout < 1:
            raise DataPrepError(f"heldout = {self.heldout} must be at least 0 and below 1")
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
        if not 1 <= self.min_bytes <= self.max_bytes <= LONGEST_DOCUMENT:
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
                "split = 'tail' goes by place, so it takes neither domain_field nor duplicates ="
                " 'drop'"
            )

    def settings(self) -> dict[str, object]:
        """All that decides the dataset but its inputs; where it is written does not."""
        return json.loads(self.model_dump_json(exclude={"output", "domains", "tokenizer"}))


def check_domain(name: str) -> str:
    """The name, when it can name a folder. Raises DataPrepError."""
    if not DOMAIN_NAME.fullmatch(name) or len(name) > 100:
        raise DataPrepError(f"domain name {name!r}: expected letters, digits, '.', '_' and '-'")
    return name
