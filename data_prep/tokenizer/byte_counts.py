"""How many bytes of the original text each token stands for."""

from __future__ import annotations

import re

import numpy as np

from data_prep.tokenizer.description import BYTE_OF, Description


def token_lengths(description: Description, vocab_size: int) -> np.ndarray:
    """uint16 [vocab_size]: UTF-8 bytes of each token as it is spelled, 0 for special tokens and holes.

    With tokenizers whose tokens have no bytes of their own every text token has at least 1, and the
    token for what the vocabulary cannot spell counts as text: it stands for bytes of the document.
    """
    lengths = np.zeros(vocab_size, dtype=np.uint16)
    for token, index in description.vocabulary.items():
        # byte-level: one character of the token per byte
        lengths[index] = min(
            len(token) if description.byte_level else max(len(token.encode()), 1), 2**16 - 1
        )
    for token in description.added:
        lengths[token.id] = (
            0
            if token.special and token.id != description.unknown_id
            else min(len(token.content.encode()), 2**16 - 1)
        )
    return lengths


def token_spellings(description: Description, vocab_size: int) -> list[bytes]:
    """The bytes that each token stands for as it is spelled.

    Empty for special tokens and holes, and for tokens that are not text by themselves (a
    WordPiece's "##").
    """
    spelled = [b""] * vocab_size
    if any(step["type"] == "ByteLevel" for step in description.steps):
        for token, index in description.vocabulary.items():
            if BYTE_OF.keys() >= set(token):
                spelled[index] = bytes(BYTE_OF[character] for character in token)
    elif description.model.get("byte_fallback"):
        for token, index in description.vocabulary.items():
            byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
            spelled[index] = (
                bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()
            )
    for token in description.added:
        spelled[token.id] = b"" if token.special else token.content.encode()
    return spelled


def utf8_positions(text: str) -> np.ndarray:
    """int64 [len(text) + 1]: UTF-8 bytes before each character, and of the whole text last."""
    if text.isascii():
        return np.arange(len(text) + 1, dtype=np.int64)
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate(([0], np.cumsum(widths)))


def sizes_from_offsets(text: str, offsets: np.ndarray) -> np.ndarray:
    """uint32 [n + 1]: bytes of `text` that each of n tokens stands for, and the end token's last.

    They sum to all of them.

    offsets: int64 [n, 2], characters [start, stop) of each token as the tokenizers library tells
    them. A token takes the bytes before its end that no earlier token took, so dropped text goes to
    what follows it, and at the end of the text to the last token. Tokens of one and the same place,
    such as the bytes of a character that is spelled byte by byte, share its bytes. The end token
    has bytes only where no other token has any.
    """
    positions = utf8_positions(text)
    count, total = len(offsets), int(positions[-1])
    sizes = np.zeros(count + 1, dtype=np.uint32)
    if not count:
        sizes[0] = total
        return sizes
    ends = np.maximum.accumulate(positions[offsets[:, 1]])
    ends[-1] = total
    sizes[:-1] = np.diff(ends, prepend=0)
    same = (offsets[1:] == offsets[:-1]).all(axis=1)
    if same.any():
        _share(sizes, same)
    return sizes


def _share(sizes: np.ndarray, same: np.ndarray) -> None:
    """Divide the bytes of every run of tokens of one place among them, what is left over to the later ones; in place.

    same: bool [n - 1], whether a token's place is that of the one before.
    """
    run = np.concatenate(([0], np.cumsum(~same)))
    lengths = np.bincount(run)
    totals = np.add.reduceat(sizes[:-1], np.flatnonzero(np.concatenate(([True], ~same)))).astype(
        np.int64
    )
    index = np.arange(len(run)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    sizes[:-1] = (totals // lengths)[run] + (index >= (lengths - totals % lengths)[run])
