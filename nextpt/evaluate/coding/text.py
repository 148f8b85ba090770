"""Exact conversion between bytes and tokens of a tokenizer whose vocabulary has all bytes."""

from __future__ import annotations

import re

import numpy as np

from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import DataError

# Bytes that are no UTF-8, as Python's surrogateescape decodes them
_RAW = re.compile("([\udc80-\udcff]+)")


class ByteCodec:
    """Encodes any bytes as tokens and decodes them exactly.

    Args:
        tokenizer: Its vocabulary has a token for every byte.

    Raises:
        DataError: The tokenizer lacks a token for some byte.
    """

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
        """Return tokens, int64, whose spellings joined are `data`.

        Text that the tokenizer would change is spelled byte by byte.
        """
        tokens: list[int] = []
        for number, part in enumerate(_RAW.split(data.decode("utf-8", "surrogateescape"))):
            if number % 2 == 0:
                tokens += self._of_text(part)
            else:
                tokens += self._by_byte(part.encode("utf-8", "surrogateescape"))
        return np.array(tokens, dtype=np.int64)

    def decode(self, tokens: np.ndarray) -> bytes:
        """Return the joined spellings of tokens."""
        return b"".join([self._spelled[token] for token in tokens.tolist()])

    def size(self, tokens: np.ndarray) -> int:
        """Return how many bytes `decode` gives, without making them."""
        return sum(len(self._spelled[token]) for token in tokens.tolist())

    def _of_text(self, text: str) -> list[int]:
        """Encode by the tokenizer where that is exact, else by line, else byte by byte."""
        whole = self._exact(text)
        if whole is not None:
            return whole
        tokens: list[int] = []
        for line in text.splitlines(keepends=True):
            exact = self._exact(line)
            tokens += self._by_byte(line.encode()) if exact is None else exact
        return tokens

    def _exact(self, text: str) -> list[int] | None:
        """Return the tokenizer's tokens if they spell the text.

        Some tokenizers put a space before it, which is taken off again.
        """
        ids, data = self._tokenizer.encode(text), text.encode()
        spelled = self.decode(ids)
        tokens: list[int] = ids.tolist()
        if spelled == data:
            return tokens
        if spelled == b" " + data and self._spelled[tokens[0]].startswith(b" "):
            return self._by_byte(self._spelled[tokens[0]][1:]) + tokens[1:]
        return None

    def _by_byte(self, data: bytes) -> list[int]:
        return [self._single[byte] for byte in data]
