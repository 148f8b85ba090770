"""Any bytes as tokens of a tokenizer whose vocabulary has all bytes, and back."""

from __future__ import annotations

import re

import numpy as np

from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import DataError

# What Python's surrogateescape makes of bytes that are no UTF-8
_RAW = re.compile("([\udc80-\udcff]+)")


class Bytes:
    """Raises DataError for a tokenizer that lacks a token for some byte."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._spelled = tokenizer.spellings()
        self._single = {
            spelled[0]: index
            for index, spelled in reversed(list(enumerate(self._spelled)))
            if len(spelled) == 1
        }
        if missing := 256 - len(self._single):
            raise DataError(
                f"the tokenizer {tokenizer.path} has no token for {missing} of the 256 bytes, so"
                " files cannot be coded with it; byte-level tokenizers, and those with byte"
                " fallback, have all"
            )

    def encode(self, data: bytes) -> np.ndarray:
        """Tokens int64 whose spellings joined are `data`.

        What the tokenizer would change is spelled byte by byte.
        """
        tokens: list[int] = []
        for number, part in enumerate(_RAW.split(data.decode("utf-8", "surrogateescape"))):
            if number % 2 == 0:
                tokens += self._of_text(part)
            else:
                tokens += self._by_byte(part.encode("utf-8", "surrogateescape"))
        return np.array(tokens, dtype=np.int64)

    def decode(self, tokens: np.ndarray) -> bytes:
        """What the tokens spell, joined."""
        return b"".join([self._spelled[token] for token in tokens.tolist()])

    def _of_text(self, text: str) -> list[int]:
        """All of it by the tokenizer where that is exact, else line by line, and what it would change byte by byte."""
        whole = self._exact(text)
        if whole is not None:
            return whole
        found: list[int] = []
        for line in text.splitlines(keepends=True):
            exact = self._exact(line)
            found += self._by_byte(line.encode()) if exact is None else exact
        return found

    def _exact(self, text: str) -> list[int] | None:
        """The tokenizer's tokens when they spell the text, also after the space that some put before it is taken away again."""
        ids, data = self._tokenizer.encode(text), text.encode()
        spelled = self.decode(ids)
        if spelled == data:
            return ids.tolist()
        if spelled == b" " + data and self._spelled[ids[0]].startswith(b" "):
            return self._by_byte(self._spelled[ids[0]][1:]) + ids[1:].tolist()
        return None

    def _by_byte(self, data: bytes) -> list[int]:
        return [self._single[byte] for byte in data]
