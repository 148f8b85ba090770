"""tiktoken as encoder of a byte-level tokenizer.json, where both libraries give the same tokens.

Why the merges are the same. Both libraries merge, again and again, the leftmost pair with the
lowest rank; the tokenizers library ranks listed pairs, tiktoken any pair whose joined bytes are a
token, by that token's id. While a token comes to be inside a text, the merges within its bytes
happen in the order in which they would in its bytes alone, so it always comes from the one pair
that is left last there. Hence both are equal when listed merges are in the order of the ids they
make, and a token can be reached by merging in one library exactly when it can in the other;
`_ranks` checks both. The patterns run in two regular-expression engines, about which there is no
such proof: they are compared on texts.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from itertools import pairwise

import numpy as np
import tiktoken
from tokenizers import Tokenizer as HFTokenizer

from data_prep.tokenizer.description import BYTE_OF, TEXT_CHARACTERS, Description
from data_prep.tokenizer.patterns import PATTERNS

# Characters up to which a text goes through encode_ordinary: a third faster than encode_to_numpy,
# which also looks for special tokens, but it makes Python integers (40 bytes each), and panics
# where the other raises (a run of 10^6 spaces).
SHORT = 2**19


class NotEligibleError(Exception):
    """tiktoken cannot replace the tokenizers library; the message is the reason, in one phrase."""


class TiktokenEncoder:
    """Encodes by tiktoken; returns None for a text that must go through the tokenizers library.

    Raises:
        NotEligibleError: When the tokenizer is one that tiktoken cannot reproduce.
    """

    def __init__(self, description: Description, library: HFTokenizer) -> None:
        pattern = _pattern(description)
        self._normalizing = _normalizing(description)
        self._split = _literals(description)
        self._literal_ids = {
            content: np.uint32(index).tobytes() for content, index in description.literals.items()
        }
        self._encoding = tiktoken.Encoding(
            description.path.stem,
            pat_str=pattern,
            mergeable_ranks=_ranks(description, library),
            special_tokens={},
        )

    def encode(self, text: str) -> np.ndarray | None:
        """Token ids, uint32 [n].

        Returns:
            None for a text that is not in normal form, or too much for the regular-expression
            engine (10^6 spaces).
        """
        if self._normalizing and not _is_nfc(text):
            return None
        try:
            if self._split is None:
                return self._ids(text)
            pieces = self._split.split(text)
            return self._ids(text) if len(pieces) == 1 else self._pieces(pieces)
        except ValueError:
            return None
        # A panic of Rust is not an Exception in Python, and can only be recognised by its name
        except BaseException as error:
            if type(error).__name__ == "PanicException":
                return None
            raise

    def _ids(self, text: str) -> np.ndarray:
        if len(text) > SHORT:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        # encode_ordinary would silently replace a lone surrogate
        text.isascii() or text.encode()
        return np.array(self._encoding.encode_ordinary(text), dtype=np.uint32)

    def _pieces(self, pieces: list[str]) -> np.ndarray:
        """Tokens of text, literal, text, ....

        A special token spelled in the text is text, and is no boundary.
        """
        joined, rest = [], pieces[0]
        for literal, text in zip(pieces[1::2], pieces[2::2], strict=True):
            token = self._literal_ids.get(literal)
            if token is None:
                rest += literal + text
                continue
            if rest:
                joined.append(self._ids(rest).tobytes())
            joined.append(token)
            rest = text
        if rest:
            joined.append(self._ids(rest).tobytes())
        return np.frombuffer(b"".join(joined), dtype=np.uint32)


def _pattern(description: Description) -> str:
    """The pattern that cuts text before merging.

    Raises:
        NotEligibleError: When there is none.
    """
    if not description.byte_level:
        raise NotEligibleError(f"it is {description.name}")
    steps = description.steps
    if [s["type"] for s in steps] == ["ByteLevel"] and steps[0].get("use_regex", True):
        return PATTERNS["gpt2"]  # what ByteLevel splits by unless use_regex is off
    if [s["type"] for s in steps] == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        pattern, way = steps[0]["pattern"].get("Regex"), (steps[0]["behavior"], steps[0]["invert"])
        # Removed and inverted drops what the pattern leaves out, as tiktoken does.
        if pattern and way in (("Isolated", False), ("Removed", True)):
            return str(pattern)
    raise NotEligibleError("its pre-tokenizer is not one pattern and bytes")


def _normalizing(description: Description) -> bool:
    normalizer = description.content.get("normalizer")
    if normalizer and normalizer["type"] != "NFC":
        raise NotEligibleError(f"it has a normalizer, {normalizer['type']}")
    return bool(normalizer)


def _literals(description: Description) -> re.Pattern[str] | None:
    """Pattern of the added tokens that are not special, at which text is cut.

    Leftmost and longest first, as the tokenizers library does. Special tokens that the library
    looks for in the same pass are in it too: one that it skips hides what it overlaps.
    """
    literals = [t for t in description.added if not t.special]
    if not literals:
        return None
    if any(t.stretches for t in literals) or len({t.normalized for t in literals}) > 1:
        raise NotEligibleError(
            "it has added tokens that take the spaces beside them, or of two passes"
        )
    if description.content.get("normalizer") and not all(_is_nfc(t.content) for t in literals):
        raise NotEligibleError("it has added tokens that are not in normal form")
    sought = [t.content for t in description.added if t.normalized == literals[0].normalized]
    return re.compile(
        "(" + "|".join(re.escape(c) for c in sorted(sought, key=len, reverse=True)) + ")"
    )


def _ranks(description: Description, library: HFTokenizer) -> dict[bytes, int]:
    """Bytes -> id of the tokens that tiktoken must know.

    Raises:
        NotEligibleError: Unless both libraries merge alike.
    """
    vocabulary = description.vocabulary
    specials = set(description.specials.values())
    merged = _ids_in_order(description)
    if merged & specials:
        raise NotEligibleError("a special token of it is also made by merging")
    model = library.model
    keeps_whole, model.ignore_merges = model.ignore_merges, False
    try:
        spelled = {
            t
            for t, i in vocabulary.items()
            if (i in merged or len(t) == 1) and i not in specials and BYTE_OF.keys() >= set(t)
        }
        reached = {
            t for t in spelled if [piece.id for piece in model.tokenize(t)] == [vocabulary[t]]
        }
    finally:
        model.ignore_merges = keeps_whole
    if any(character not in reached for character in TEXT_CHARACTERS):
        raise NotEligibleError("a byte of it is no token")
    ranks = {bytes(BYTE_OF[c] for c in token): vocabulary[token] for token in reached}
    # A token that no merging reaches is still used where it is a whole piece between two cuts
    if keeps_whole:
        whole = {t: i for t, i in vocabulary.items() if t not in reached and i not in specials}
        try:
            ranks |= {bytes(BYTE_OF[c] for c in token): index for token, index in whole.items()}
        except KeyError as error:
            raise NotEligibleError(
                f"a token of it has the character {error}, which is no byte"
            ) from None
        for token in whole:
            if last_pair(data := bytes(BYTE_OF[c] for c in token), ranks):
                raise NotEligibleError(
                    f"tiktoken would merge {data!r}, which its list of merges does not"
                )
    if len(set(ranks.values())) < len(ranks):  # tiktoken would panic
        raise NotEligibleError("two of its tokens have one id")
    return ranks


def _ids_in_order(description: Description) -> set[int]:
    """Ids of the tokens that merges make.

    Raises:
        NotEligibleError: When merges are not in the order of these ids.
    """
    merged, before = set(), -1
    for merge in description.model["merges"]:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        index = description.vocabulary[left + right]
        if index < before:
            raise NotEligibleError("its merges are not in the order of the ids they make")
        merged.add(index)
        before = index
    return merged


def last_pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts that `token` is merged from, by rank of the joined bytes and leftmost first.

    None where merging ends before.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, at = min(
            (ranks.get(a + b, sys.maxsize), i) for i, (a, b) in enumerate(pairwise(parts))
        )
        if rank == sys.maxsize:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _is_nfc(text: str) -> bool:
    """Whether NFC leaves `text` alone.

    By Python's Unicode (14 or newer), and so by the library's, which is older.
    """
    return text.isascii() or unicodedata.is_normalized("NFC", text)
