"""Output of datatrove is read unchanged.

Version 0.10.1 made the files in fixtures/datatrove from raw/ (docs/curation.md).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.documents import read_documents
from data_prep.format import DatasetManifest
from data_prep.prepare import prepare
from data_prep.spec import PrepSpec

FOLDER = Path(__file__).parent / "fixtures" / "datatrove"


def raw() -> dict[str, str]:
    """Text of each input document of datatrove, by id."""
    lines = (
        line
        for file in sorted((FOLDER / "raw").iterdir())
        for line in file.read_text(encoding="utf-8").splitlines()
    )
    return {record["id"]: record["text"] for record in map(json.loads, lines)}


def test_documents_of_datatrove_are_those_that_passed_its_filters() -> None:
    documents = {
        document.id: document.text for document in read_documents(str(FOLDER / "*.jsonl.gz"))
    }
    assert (
        documents == {name: text for name, text in raw().items() if name.startswith("letters/")}
        and len(documents) == 5
    )


@pytest.mark.thorough
def test_they_are_prepared_with_their_metadata_as_domain(dataset: Path, tmp_path: Path) -> None:
    prepare(
        PrepSpec(
            domains={"web": FOLDER / "*.jsonl.gz"},
            output=tmp_path / "data",
            sequence_length=64,
            tokenizer=dataset / "tokenizer.json",
            validation_fraction=0.0,
            domain_field="metadata.source",
        )
    )
    manifest = DatasetManifest.load(tmp_path / "data")
    counts = manifest.splits["train"]["letters"]
    assert manifest.domains == ["letters"] and counts.documents == 5
    assert counts.bytes == sum(
        len(text.encode()) for name, text in raw().items() if name.startswith("letters/")
    )
