"""UTF-8 bytes of the original text that each token stands for."""

from __future__ import annotations

import re

import numpy as np

from data_prep.tokenizer.description import BYTE_OF, Description


def token_lengths(description: Description, vocab_size: int) -> np.ndarray:
    """UTF-8 bytes of each token as spelled, uint16 [vocab_size]; 0 for special tokens and holes.

    With tokenizers whose tokens have no bytes of their own every text token has at least 1, and the
    token for text that the vocabulary cannot spell counts as text: it stands for bytes of the
    document.
    """
    lengths = np.zeros(vocab_size, dtype=np.uint16)
    for token, index in description.vocabulary.items():
        # byte-level: one character of the token per byte
        lengths[index] = min(
            len(token) if description.byte_level else max(len(token.encode()), 1), 2**16 - 1
        )
    for added in description.added:
        lengths[added.id] = (
            0
            if added.special and added.id != description.unknown_id
            else min(len(added.content.encode()), 2**16 - 1)
        )
    return lengths


def token_spellings(description: Description, vocab_size: int) -> list[bytes]:
    """Bytes that each token is spelled with.

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
    for added in description.added:
        spelled[added.id] = b"" if added.special else added.content.encode()
    return spelled


def utf8_positions(text: str) -> np.ndarray:
    """int64 [len(text) + 1]: UTF-8 bytes before each character, and of the whole text last."""
    if text.isascii():
        return np.arange(len(text) + 1, dtype=np.int64)
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate(([0], np.cumsum(widths)))


def sizes_from_offsets(text: str, offsets: np.ndarray) -> np.ndarray:
    """Bytes of `text` that each of n tokens stands for, and the end token's last; they sum to all.

    A token takes the bytes before its end that no earlier token took, so dropped text goes to the
    token that follows it, and at the end of the text to the last token. Tokens of the same
    position, such as the bytes of a character that is spelled byte by byte, share its bytes. The
    end token has bytes only where no other token has any.

    Args:
        text: The text.
        offsets: int64 [n, 2], characters [start, stop) of each token, from the tokenizers library.

    Returns:
        uint32 [n + 1].
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
    """Divide the bytes of every run of tokens of one position among them, in place.

    Bytes left over go to the later tokens of the run. same: bool [n - 1], whether a token has the
    position of the one before.
    """
    run = np.concatenate(([0], np.cumsum(~same)))
    lengths = np.bincount(run)
    totals = np.add.reduceat(sizes[:-1], np.flatnonzero(np.concatenate(([True], ~same)))).astype(
        np.int64
    )
    index = np.arange(len(run)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    sizes[:-1] = (totals // lengths)[run] + (index >= (lengths - totals % lengths)[run])
