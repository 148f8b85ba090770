"""Fixtures of the tests of data_prep."""

from __future__ import annotations

import pytest

from data_prep.tokenizer import Tokenizer
from tests.support.tokenizers import KINDS


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """A small tokenizer of every kind, by kind."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind, make in KINDS.items():
        make(folder / f"{kind}.json")
    return {kind: Tokenizer(folder / f"{kind}.json") for kind in KINDS}
