"""Incremental detokenization for every tokenizer, and no part of a stop string."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.tokenizer import Tokenizer
from nextpt.generate.stopping import IncrementalDetokenizer, StopStringFilter
from tests.support.tokenizers import ANY_TEXT, KINDS

ANY = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="module", params=ANY_TEXT)
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    KINDS[request.param](path)
    return Tokenizer(path)


def pieces(tokenizer: Tokenizer, ids: list[int], first: int) -> list[str]:
    growing = IncrementalDetokenizer(tokenizer, [tokenizer.start_id, *ids[:first]])
    return [piece for token in ids[first:] for piece in growing.add(token)] + list(growing.flush())


@pytest.mark.thorough
@settings(max_examples=60, deadline=None)
@given(
    text=ANY
    | st.sampled_from(
        ["Hello  world, it's \U0001f600\U0001f468\u200d\U0001f469!", " a \n\n b", "don't do n't"]
    ),
    data=st.data(),
)
def test_pieces_are_the_text(tokenizer: Tokenizer, text: str, data: st.DataObject) -> None:
    ids = tokenizer.encode(text).tolist()
    first = data.draw(st.integers(0, len(ids)))
    while tokenizer.decode(ids[:first]).endswith("\ufffd"):  # a prompt is whole characters
        first -= 1
    parts = pieces(tokenizer, ids, first)
    assert tokenizer.decode(ids[:first]) + "".join(parts) == tokenizer.decode(ids)
    assert all(parts)


def test_a_character_of_several_tokens_is_emitted_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a\U0001f680\U0001f681").tolist()
    parts = pieces(tokenizer, ids, 0)
    assert not any("\ufffd" in piece for piece in parts) and "".join(parts) == tokenizer.decode(ids)


def test_emitted_text_is_never_retracted(tmp_path: Path) -> None:
    """Llama's decoder turns valid bytes before an invalid one into invalid ones."""
    KINDS["llama"](tmp_path / "tokenizer.json")
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    ids = tokenizer.encode("a\U0001f680").tolist()
    assert (
        "".join(pieces(tokenizer, [*ids, ids[-1], *tokenizer.encode("b").tolist()], 0))
        == "a\U0001f680\ufffd b"
    )


@given(
    pieces=st.lists(st.text(alphabet="ab\n", max_size=4), max_size=12),
    stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3),
)
def test_nothing_of_a_stop_string_is_shown(pieces: list[str], stops: list[str]) -> None:
    """For any division into pieces; text that cannot begin a stop string is emitted at once."""
    stopping, text, shown = StopStringFilter(stops), "", ""
    for piece in pieces:
        text += piece
        shown += stopping.add(piece)
        positions = [text.find(stop) for stop in stops if stop in text]
        assert stopping.matched == bool(positions)
        if positions:
            assert shown == text[: min(positions)] and stopping.flush() == ""
            return
        withheld = text[len(shown) :]
        assert text.startswith(shown) and (
            not withheld or any(stop.startswith(withheld) for stop in stops)
        )
    assert shown + stopping.flush() == text
