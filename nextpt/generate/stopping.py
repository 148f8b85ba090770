"""Text that grows piece by piece: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from data_prep.tokenizer import Tokenizer


class GrowingText:
    """The text of a growing list of tokens, piece by piece.

    joined, the pieces are the text after that of the first tokens.

    What a token reads as depends on those before it: decoders take the space off the front of a
    text, and a character may take several tokens. So the tokens of the piece before are decoded
    again with the new ones.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: Sequence[int]) -> None:
        self._tokenizer, self._tokens = tokenizer, list(tokens)
        # Where the piece before begins, and the tokens whose text was given
        self._before, self._shown = 0, len(tokens)

    def add(self, token: int) -> Iterator[str]:
        """Take one more token; yields the text that is now whole, if any."""
        self._tokens.append(token)
        if not self._new().endswith("\ufffd"):
            yield from self.rest()

    def rest(self) -> Iterator[str]:
        """Yield what has not been given, whole or not."""
        if text := self._new():
            yield text
            self._before, self._shown = self._shown, len(self._tokens)

    def _new(self) -> str:
        given, text = (
            self._tokenizer.decode(self._tokens[self._before : stop])
            for stop in (self._shown, None)
        )
        if text.startswith(given):
            return text[len(given) :]
        # A byte that ends no character makes the decoder of byte tokens take back those before it,
        # which were right.
        return self._tokenizer.decode(self._tokens[self._shown :])


class StopStrings:
    """Holds back what may become a stop string. found: one has come; the text ended before it."""

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string"
        self._stops, self._held, self.found = tuple(stops), "", False

    def add(self, piece: str) -> str:
        """The text that may be shown after one more piece; may be empty."""
        self._held += piece
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            return self._give(min(places))
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        held = next(
            (
                n
                for n in range(min(longest, len(self._held)), 0, -1)
                if any(stop.startswith(self._held[-n:]) for stop in self._stops)
            ),
            0,
        )
        return self._give(len(self._held) - held)

    def rest(self) -> str:
        """What was held back and became no stop string; nothing after one was found."""
        return "" if self.found else self._give(len(self._held))

    def _give(self, size: int) -> str:
        text, self._held = self._held[:size], self._held[size:]
        return text
