"""Errors for users: one line of bounded length."""

from __future__ import annotations

from nextpt.base.errors import LONGEST_MESSAGE, DataError


def test_a_long_value_of_a_message_is_cut_in_its_middle() -> None:
    short = "x" * LONGEST_MESSAGE
    assert str(DataError(short)) == short
    text = str(DataError(f"{'file ' * 1_000}has {'y' * 100_000} at its end"))
    assert len(text) <= LONGEST_MESSAGE
    assert text.startswith("file file") and text.endswith("yyy at its end")
    assert "characters]" in text
