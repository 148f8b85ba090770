"""Encoding of text that spells a special token as text.

It stays text also where the model's own vocabulary holds the token.
"""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer as HFTokenizer

from data_prep.tokenizer.description import BYTE_CHARACTERS, Description
from nextpt.base.errors import DataPrepError


class Respeller:
    """Replaces special tokens that a model made of text by the tokens of single characters.

    The tokenizers library ignores special tokens in the text, but a model whose vocabulary holds
    "</s>" as a piece, as Unigram's does, may still make it of the same characters. The token for
    unknown text is no such case, unless the text spells its name.
    """

    def __init__(self, description: Description, library: HFTokenizer, vocab_size: int) -> None:
        self._description = description
        self._library = library
        self._special = np.zeros(vocab_size, dtype=bool)
        self._special[list(description.specials.values())] = True
        self._names = {index: content for content, index in description.specials.items()}
        self._spellings: dict[str, list[int]] = {}
        self._unknown = description.unknown_id if description.unknown_id in self._names else None
        if self._unknown is not None:
            self._special[self._unknown] = False

    def suspects(self, text: str, ids: np.ndarray) -> bool:
        """Whether there is a special token among the ids of a text."""
        return bool(self._special[ids].any()) or (
            self._unknown is not None and self._names[self._unknown] in text
        )

    def __call__(
        self, text: str, ids: np.ndarray, offsets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Spell special tokens by the characters they stand for.

        Returns:
            The ids, and their positions int64 [n, 2] in characters.
        """
        new_ids: list[int] = []
        new_offsets: list[tuple[int, int]] = []
        for index, (start, stop) in zip(ids.tolist(), offsets.tolist(), strict=True):
            spells_unknown = (
                index == self._unknown and text[start:stop].strip() == self._names[index]
            )
            if not self._special[index] and not spells_unknown:
                new_ids.append(index)
                new_offsets.append((start, stop))
                continue
            for position in range(start, stop):
                spelled = self._character(text[position], index)
                new_ids += spelled
                new_offsets += [(position, position + 1)] * len(spelled)
        return np.array(new_ids, dtype=np.uint32), np.array(new_offsets, dtype=np.int64).reshape(
            -1, 2
        )

    def _character(self, character: str, special: int) -> list[int]:
        """The tokens of one character."""
        if character not in self._spellings:
            spelling = (
                [BYTE_CHARACTERS[b] for b in character.encode()]
                if self._description.byte_level
                else [character]
            )
            self._spellings[character] = [
                token.id for part in spelling for token in self._library.model.tokenize(part)
            ]
        ids = self._spellings[character]
        if self._special[ids].any():
            raise DataPrepError(
                f"the tokenizer {self._description.path} has no way to spell the special token"
                f" {self._names[special]!r} in a text"
            )
        return ids
