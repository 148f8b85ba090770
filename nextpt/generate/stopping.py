"""Incremental detokenization: whole characters only, and no part of a stop string."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from data_prep.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Text of a growing list of tokens, piece by piece.

    Joined, the pieces are the text after that of the first tokens. What a token reads as depends on
    those before it: decoders strip the space at the front of a text, and a character may take
    several tokens. So the tokens of the previous piece are decoded again with the new ones.

    Args:
        tokenizer: Decodes the tokens.
        tokens: The first tokens, whose text is not returned.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(tokens)
        # First token of the previous piece, and number of tokens whose text was returned
        self._previous = 0
        self._returned = len(tokens)

    def add(self, token: int) -> Iterator[str]:
        """Append a token; yields the text that is now complete, if any."""
        self._tokens.append(token)
        if not self._new_text().endswith("\ufffd"):
            yield from self.flush()

    def flush(self) -> Iterator[str]:
        """Yield the text that was not returned yet, complete or not."""
        if text := self._new_text():
            yield text
            self._previous, self._returned = self._returned, len(self._tokens)

    def _new_text(self) -> str:
        returned, text = (
            self._tokenizer.decode(self._tokens[self._previous : stop])
            for stop in (self._returned, None)
        )
        if text.startswith(returned):
            return text[len(returned) :]
        # A byte that ends no character makes the decoder of byte tokens take back those before it,
        # which were right.
        return self._tokenizer.decode(self._tokens[self._returned :])


class StopStringFilter:
    """Holds back text that may become a stop string, and ends the text before one.

    Attributes:
        matched: A stop string occurred; the text ended before it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string"
        self._stops = tuple(stops)
        self._held = ""
        self.matched = False

    def add(self, piece: str) -> str:
        """Append a piece; returns the text that may be shown, which may be empty."""
        self._held += piece
        starts = [start for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if starts:
            self.matched = True
            return self._release(min(starts))
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        held = next(
            (
                n
                for n in range(min(longest, len(self._held)), 0, -1)
                if any(stop.startswith(self._held[-n:]) for stop in self._stops)
            ),
            0,
        )
        return self._release(len(self._held) - held)

    def flush(self) -> str:
        """Return the text that was held back; empty after a stop string."""
        return "" if self.matched else self._release(len(self._held))

    def _release(self, size: int) -> str:
        text, self._held = self._held[:size], self._held[size:]
        return text
