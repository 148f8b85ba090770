"""Any bytes as tokens of a tokenizer whose vocabulary has all bytes, and back."""

from __future__ import annotations

import re

import numpy as np

from data_prep.tokenizer import Tokenizer
from nextpt.errors import DataError

_RAW = re.compile("([\udc80-\udcff]+)")  # what Python's surrogateescape makes of bytes that are no UTF-8


class Bytes:
    """Raises DataError for a tokenizer that lacks a token for some byte."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._spelled = tokenizer.spellings()
        self._single = {spelled[0]: index for index, spelled in reversed(list(enumerate(self._spelled))) if len(spelled) == 1}
        if missing := 256 - len(self._single):
            raise DataError(f"the tokenizer {tokenizer.path} has no token for {missing} of the 256 bytes, so files cannot be coded with it; "
                            "byte-level tokenizers, and those with byte fallback, have all")

    def encode(self, data: bytes) -> np.ndarray:
        """Tokens int64 whose spellings joined are `data`. What the tokenizer would change is spelled byte by byte."""
        tokens: list[int] = []
        for number, part in enumerate(_RAW.split(data.decode("utf-8", "surrogateescape"))):
            if number % 2 == 0:
                for piece in [part] if self._exact(part) else part.splitlines(keepends=True):
                    tokens += self._tokenizer.encode(piece).tolist() if self._exact(piece) else self._by_byte(piece.encode())
            else:
                tokens += self._by_byte(part.encode("utf-8", "surrogateescape"))
        return np.array(tokens, dtype=np.int64)

    def decode(self, tokens: np.ndarray) -> bytes:
        """What the tokens spell, joined."""
        return b"".join([self._spelled[token] for token in tokens.tolist()])

    def _exact(self, text: str) -> bool:
        return self.decode(self._tokenizer.encode(text)) == text.encode()

    def _by_byte(self, data: bytes) -> list[int]:
        return [self._single[byte] for byte in data]
