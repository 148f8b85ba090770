"""Choice of the tokenizer of a preparation, and of the library that encodes with it.

The tokenizer is given, trained on the corpus, or made of its characters. WORK/tokenizer.json and
WORK/encoder.json (written last) hold the choice, so that all workers encode alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import xxhash

from data_prep.format import token_dtype
from data_prep.plan import Plan, Unit
from data_prep.records import Record, describe_bad, read_part
from data_prep.tokenizer import Tokenizer, convert, train_bpe, write_character_tokenizer
from nextpt.base.errors import DataPrepError
from nextpt.base.files import atomic_write

# Bytes of text that a tokenizer is trained on, taken evenly from all units. More text changes
# little, and takes memory.
TRAINING_BYTES = 2**28
# Texts on which the two libraries must agree, from all over the corpus
SAMPLE_UNITS, SAMPLE_DOCUMENTS, SAMPLE_CHARACTERS = 32, 16, 2**14


@dataclass
class _BadRecords:
    """Number of bad records, and what is wrong with the first."""

    count: int = 0
    first: str = ""


def choice_path(work: Path) -> Path:
    """WORK/encoder.json, which exists when the tokenizer does."""
    return work / "encoder.json"


def make_tokenizer(plan: Plan) -> None:
    """Write WORK/tokenizer.json and choose the library.

    Raises:
        DataPrepError: When the tokenizer cannot be made, or the library that was asked for differs.
    """
    spec, path = plan.spec, plan.spec.work / "tokenizer.json"
    bad = _BadRecords()
    try:
        if spec.tokenizer is not None:
            convert(str(spec.tokenizer), path, start=spec.start_token, end=spec.end_token)
        elif spec.characters:
            # The characters of both splits: a vocabulary of characters cannot spell any other one.
            write_character_tokenizer(
                (text for unit in plan.units for text, _ in _texts(plan, unit, bad)), path
            )
        else:
            assert spec.vocab_size is not None  # PrepSpec.check
            train_bpe(_training_texts(plan, bad), spec.vocab_size, path)
    except DataPrepError as error:
        if not bad.count:
            raise
        # The first cause: what could not be read is lacking in what the tokenizer is made of.
        raise DataPrepError(
            f"{bad.count} records are bad; the first: {bad.first} ({error})"
        ) from error
    tokenizer = Tokenizer(path, encoder=spec.encoder)
    token_dtype(tokenizer.vocab_size)
    encoder, reason = tokenizer.encoder, tokenizer.encoder_reason
    if encoder == "tiktoken":
        sample = list(_sample(plan))
        reason += f" and on {len(sample)} texts of this corpus"
        if difference := tokenizer.difference(sample):
            if spec.encoder == "tiktoken":
                raise DataPrepError(
                    "encoder = 'tiktoken', but the two libraries differ on this corpus:"
                    f" {difference}"
                )
            encoder, reason = "tokenizers", f"the two libraries differ on this corpus: {difference}"
    with atomic_write(choice_path(spec.work)) as file:
        json.dump({"encoder": encoder, "reason": reason}, file)


@lru_cache(maxsize=1)
def chosen_tokenizer(plan_sha256: str, work: Path) -> Tokenizer:
    """Open the tokenizer of a preparation, once per process.

    Args:
        plan_sha256: Identity of the plan; keeps preparations apart in the cache.
        work: Work folder.
    """
    choice = json.loads(choice_path(work).read_text(encoding="utf-8"))
    return Tokenizer(work / "tokenizer.json", encoder=choice["encoder"])


def encoder_reason(work: Path) -> str:
    """Why the library was chosen."""
    return str(json.loads(choice_path(work).read_text(encoding="utf-8"))["reason"])


def _texts(plan: Plan, unit: Unit, bad: _BadRecords | None = None) -> Iterator[tuple[str, bool]]:
    """Yield (text, whether it is held out) of the good records of a unit.

    Args:
        plan: The plan.
        unit: The unit.
        bad: Counts the bad records.
    """
    tail_from, threshold = unit.tail_from, int(plan.spec.validation_fraction * 2**64)
    for part in unit.parts:
        for record in read_part(part, plan.fields):
            if not isinstance(record, Record):
                if bad is not None:
                    bad.first = bad.first or describe_bad(part.file, record)
                    bad.count += 1
                continue
            if tail_from is None:
                yield (
                    record.text,
                    xxhash.xxh64_intdigest(record.text.encode("utf-8", "replace")) < threshold,
                )
                continue
            head, tail = record.text[:tail_from], record.text[tail_from:]
            tail_from = max(tail_from - len(record.text), 0)
            yield from (
                (text, held_out) for text, held_out in ((head, False), (tail, True)) if text
            )


def _training_texts(plan: Plan, bad: _BadRecords) -> Iterator[str]:
    """Yield texts of the training split.

    Of a corpus above TRAINING_BYTES, only the first texts of every unit.
    """
    share = TRAINING_BYTES // max(len(plan.units), 1)
    for unit in plan.units:
        left = share if len(plan.units) > 1 else TRAINING_BYTES
        for text, held_out in _texts(plan, unit, bad):
            if not held_out:
                yield text
                left -= len(text)
            if left <= 0:
                break


def _sample(plan: Plan) -> Iterator[str]:
    step = max(len(plan.units) // SAMPLE_UNITS, 1)
    for unit in plan.units[::step]:
        for text, _ in islice(_texts(plan, unit), SAMPLE_DOCUMENTS):
            yield text[:SAMPLE_CHARACTERS]
