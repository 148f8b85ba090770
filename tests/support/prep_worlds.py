"""Small corpora cut into many units and groups: many steps at which a kill may come."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_prep.format import DatasetManifest
from data_prep.prepare import prepare as prepare_anywhere
from data_prep.spec import PrepSpec
from data_prep.tokenizer import train_bpe
from data_prep.workers import LocalWorkers

WORDS = (
    "the quick brown fox jumps over a lazy dog while ä naïve 漢字 reader counts 1234 tokens in def"
    " main(): pass".split()
)


def texts(count: int, salt: int = 0) -> list[str]:
    """Distinct texts of 1 to about 400 words."""
    contents = []
    for i in range(count):
        draw = hashlib.sha256(f"{salt}:{i}".encode()).digest()
        length = 1 + draw[0] * (1 + draw[1] % 7) // 4
        contents.append(
            " ".join(WORDS[draw[j % 32] % len(WORDS)] for j in range(length)) + f" {salt}/{i}\n"
        )
    return contents


def write_lines(path: Path, contents: list[str], **more: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for i, text in enumerate(contents):
            file.write(
                json.dumps({"id": f"{path.name}/{i}", "text": text} | more, ensure_ascii=False)
                + "\n"
            )
    return path


def world(folder: Path, documents: int = 120) -> PrepSpec:
    """A corpus of two domains and a tokenizer; sequences of 64."""
    write_lines(folder / "in/a/1.jsonl", texts(documents, 1))
    write_lines(folder / "in/a/2.jsonl", texts(documents // 2, 2))
    write_lines(folder / "in/b.jsonl", texts(documents // 2, 3))
    train_bpe(texts(documents, 1), 350, folder / "tokenizer.json")
    return PrepSpec(
        domains={"a": folder / "in/a", "b": folder / "in/b.jsonl"},
        output=folder / "out",
        sequence_length=64,
        tokenizer=folder / "tokenizer.json",
        validation_fraction=0.2,
    )


def prepare(spec: PrepSpec, *, overwrite: bool = False) -> DatasetManifest:
    """In this process, where small_units holds."""
    return prepare_anywhere(spec, overwrite=overwrite, workers=LocalWorkers(1))


@contextmanager
def small_units(unit: int = 20_000, group: int = 8_000, partition: int = 50) -> Iterator[None]:
    """Set the sizes of units (bytes), groups (tokens) and partitions (documents)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.plan.UNIT_BYTES", unit)
        patch.setattr("data_prep.layout.GROUP_TOKENS", group)
        patch.setattr("data_prep.duplicates.PARTITION", partition)
        yield


def content(dataset: Path) -> dict[str, str]:
    """Hashes of all files of a dataset folder but the report, which tells times."""
    return {
        str(p.relative_to(dataset)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(dataset.rglob("*"))
        if p.is_file() and p.stem != "report"
    }


def lines_of(path: Path) -> list[bytes]:
    """The lines of a file."""
    return path.read_bytes().split(b"\n")[:-1]
