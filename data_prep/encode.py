"""Tokenization of one unit: records in; tokens, held-out documents and bad records out.

WORK/tok/NNNNNN.tok is written last (data_prep.tokens); beside it are NNNNNN.validation.jsonl
and NNNNNN.bad.jsonl. Every record is counted once: in documents, in `filtered` (with the reason)
or in `bad` (why it cannot be used).
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash

from data_prep.format import token_dtype
from data_prep.inputs import InputFile
from data_prep.plan import Plan, Unit
from data_prep.records import Bad, Record, read_part
from data_prep.spec import PrepSpec, check_domain
from data_prep.tokenizer import Tokenizer
from data_prep.tokens import TokensWriter
from nextpt.base.errors import DataPrepError, UserError
from nextpt.base.files import atomic_write

# Texts per call of the tokenizer: enough to make the call's overhead negligible, small in memory
BATCH_DOCUMENTS, BATCH_CHARACTERS = 256, 2**20
# Characters of each unit's first text on which the two libraries are compared; milliseconds
CHECKED_CHARACTERS = 2**15
Advance = Callable[[int], None]
Write = Callable[[bytes], object]


def tokens_path(work: Path, unit: int) -> Path:
    """The .tok file of a unit, which exists when the unit is done."""
    return work / "tok" / f"{unit:06d}.tok"


def validation_path(tokens: Path) -> Path:
    """Held-out documents of a unit, beside its .tok file."""
    path, old = tokens.with_suffix(".validation.jsonl"), tokens.with_suffix(".heldout.jsonl")
    return old if old.exists() else path  # `old` was written before format version 3


def encode_unit(
    plan: Plan, unit: Unit, tokenizer: Tokenizer, advance: Advance = lambda n: None
) -> None:
    """Tokenize a unit into WORK/tok.

    Raises:
        DataPrepError: When a file cannot be read at all.
    """
    path = tokens_path(plan.spec.work, unit.index)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = TokensWriter(
        path, token_dtype(tokenizer.vocab_size), sizes=tokenizer.byte_counts == "column"
    )
    try:
        with (
            atomic_write(path.with_suffix(".validation.jsonl"), "wb") as validation,
            atomic_write(path.with_suffix(".bad.jsonl"), "wb") as bad,
        ):
            encoding = _Encoding(plan.spec, unit, tokenizer, writer, validation.write, bad.write)
            for number, part in enumerate(unit.parts):
                encoding.encode_part(number, part.file, read_part(part, plan.fields, advance))
        writer.finish(encoding.footer())
    finally:
        writer.abandon()


class _Encoding:
    """State of one unit while it is tokenized."""

    def __init__(
        self,
        spec: PrepSpec,
        unit: Unit,
        tokenizer: Tokenizer,
        writer: TokensWriter,
        write_validation: Write,
        write_bad: Write,
    ) -> None:
        self.spec = spec
        self.unit = unit
        self.tokenizer = tokenizer
        self.writer = writer
        self.write_validation = write_validation
        self.write_bad = write_bad
        self.table = tokenizer.token_bytes().astype(np.int64)
        self.domains: dict[str, int] = {}
        self.part = self.records = self.cuts = 0
        self.filtered: Counter[str] = Counter()
        self.bad: Counter[str] = Counter()
        self.totals: dict[str, list[int]] = {}
        self.tail_from = unit.tail_from
        self.last: Record | None = None
        self.threshold = int(spec.validation_fraction * 2**64)
        self.checked = tokenizer.encoder != "tiktoken"
        self.started = time.process_time()
        self.encoding_seconds = 0.0

    def encode_part(self, number: int, file: InputFile, records: Iterator[Record | Bad]) -> None:
        """Tokenize the records of part `number` of the unit."""
        self.part = number
        group: list[Record] = []
        characters = 0
        for record in records:
            self.records += 1
            if isinstance(record, Bad):
                self._quarantine(file, record)
                continue
            group.append(record)
            characters += len(record.text)
            if len(group) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                self._encode(file, group)
                group, characters = [], 0
        self._encode(file, group)

    def _quarantine(self, file: InputFile, bad: Bad) -> None:
        self.bad[bad.reason] += 1
        line = {
            "file": file.uri,
            "position": bad.position,
            "reason": bad.reason,
            "detail": bad.detail,
            "id": bad.id,
        }
        self.write_bad(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))

    def _encode(self, file: InputFile, group: list[Record]) -> None:
        """Tokenize a group of records; one by one when the tokenizer refuses the group."""
        usable = [
            (record, data) for record in group if (data := self._utf8(file, record)) is not None
        ]
        sides = [
            (record, text, data, held_out)
            for record, data in usable
            for text, data, held_out in self._sides(record.text, data)
        ]
        started = time.process_time()
        encoded: list[tuple[np.ndarray, np.ndarray | None] | None]
        try:
            encoded = list(self._tokens([text for _, text, _, _ in sides]))
        except _Disagreement:
            raise
        except UserError:
            encoded = [self._alone(file, record, text) for record, text, _, _ in sides]
        self.encoding_seconds += time.process_time() - started
        for (record, text, data, held_out), tokens in zip(sides, encoded, strict=True):
            if tokens is not None:
                self._add(file, record, text, data, held_out, *tokens)

    def _tokens(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        if self.tokenizer.byte_counts == "column":
            return [self.tokenizer.encode_with_bytes(text) for text in texts]
        if texts and not self.checked:
            self._check_libraries(texts[0][:CHECKED_CHARACTERS])
        return [(ids, None) for ids in self.tokenizer.encode_batch(texts)]

    def _check_libraries(self, text: str) -> None:
        """Compare the libraries on one text of every unit.

        The faster library was chosen by a comparison on other texts.
        """
        self.checked = True
        if difference := self.tokenizer.difference([text]):
            raise _Disagreement(
                f"the two tokenizer libraries differ on a text of unit {self.unit.index}:"
                f" {difference}; start again with --encoder tokenizers"
            )

    def _alone(
        self, file: InputFile, record: Record, text: str
    ) -> tuple[np.ndarray, np.ndarray | None] | None:
        try:
            return self._tokens([text])[0]
        except _Disagreement:
            raise
        except UserError as error:
            self._quarantine(
                file, Bad(record.position, "the tokenizer refuses it", str(error), record.id)
            )
            return None

    def _utf8(self, file: InputFile, record: Record) -> bytes | None:
        """UTF-8 of a record's text; None, and counted, when it is filtered or quarantined."""
        try:
            data = record.text.encode()
        except UnicodeEncodeError as error:
            self._quarantine(
                file, Bad(record.position, "lone surrogate", f"character {error.start}", record.id)
            )
            return None
        if not data:
            self.filtered["empty"] += 1
        elif len(data) < self.spec.min_bytes:
            self.filtered["shorter than min_bytes"] += 1
        elif self.spec.max_bytes is not None and len(data) > self.spec.max_bytes:
            self.filtered["longer than max_bytes"] += 1
        else:
            if record.domain is None or self._is_domain(file, record):
                return data
        return None

    def _is_domain(self, file: InputFile, record: Record) -> bool:
        try:
            return bool(check_domain(record.domain or ""))
        except UserError as error:
            self._quarantine(file, Bad(record.position, "no domain name", str(error), record.id))
            return False

    def _sides(self, text: str, data: bytes) -> list[tuple[str, bytes, bool]]:
        """(text, its UTF-8, held out) of one document.

        Two of them where the held-out tail begins inside the document.
        """
        if self.tail_from is None:
            return [(text, data, xxhash.xxh64_intdigest(data) < self.threshold)]
        head, tail = text[: self.tail_from], text[self.tail_from :]
        self.tail_from = max(self.tail_from - len(text), 0)
        self.cuts += bool(head and tail)
        return [
            (side, side.encode(), held_out)
            for side, held_out in ((head, False), (tail, True))
            if side
        ]

    def _add(
        self,
        file: InputFile,
        record: Record,
        text: str,
        data: bytes,
        held_out: bool,
        ids: np.ndarray,
        sizes: np.ndarray | None,
    ) -> None:
        counted = int(self.table[ids].sum()) if sizes is None else int(sizes.sum())
        if counted != len(data):
            self._quarantine(
                file,
                Bad(
                    record.position,
                    "the tokenizer changes it",
                    f"its tokens stand for {counted} of {len(data)} bytes",
                    record.id,
                ),
            )
            return
        domain = record.domain or self.unit.source
        index = self.domains.setdefault(domain, len(self.domains))
        # Head and tail of a cut document have the same id, which is not a clash.
        id_hash = (
            _id_hash(domain, record.id) if record.id is not None and record is not self.last else 0
        )
        self.last = record
        self.writer.add(
            ids,
            sizes,
            (
                xxhash.xxh64_intdigest(data),
                id_hash,
                record.position,
                self.part,
                len(ids),
                len(data),
                index,
                held_out,
            ),
        )
        total = self.totals.setdefault(domain, [0, 0, 0, 0])
        for i, amount in enumerate((1, len(ids), len(data), held_out)):
            total[i] += amount
        if held_out:
            line = {
                "doc": self.writer.count - 1,
                "id": record.id or f"{file.name}:{record.position}",
                "text": text,
            }
            self.write_validation(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))

    def footer(self) -> dict[str, Any]:
        """The unit's footer; records + cuts = documents + filtered + bad.

        totals: domain -> [documents, tokens, bytes, held-out documents].
        """
        return {
            "domains": list(self.domains),
            "records": self.records,
            "cuts": self.cuts,
            "filtered": self.filtered,
            "bad": self.bad,
            "totals": self.totals,
            "seconds": time.process_time() - self.started,
            "encoding_seconds": self.encoding_seconds,
            "worker": f"{socket.gethostname()}:{os.getpid()}",
        }


def _id_hash(domain: str, name: str) -> int:
    """Hash of an id within its domain; never 0, which says that there is no id."""
    return xxhash.xxh64_intdigest(f"{domain}\0{name}".encode("utf-8", "surrogatepass")) or 1


class _Disagreement(DataPrepError):
    """The tokenizer libraries differ; no document is at fault, so none is quarantined for it."""
