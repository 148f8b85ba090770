"""Description of a tokenizer.json: kind, special tokens, whether tokens have fixed bytes."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nextpt.base.errors import DataPrepError, InputWarning

OTHERS = "other formats: nextpt tokenizer convert SOURCE --output tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
# Names of the end and the start token in published tokenizers; the first that exists is used.
ENDS = (
    END_OF_TEXT,
    "</s>",
    "<|end_of_text|>",
    "<eos>",
    "<|end▁of▁sentence|>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001 - DeepSeek spells it so
    "[SEP]",
    "<|eos|>",
    "[EOS]",
)
STARTS = (
    "<s>",
    "<bos>",
    "<|begin_of_text|>",
    "<|startoftext|>",
    "<｜begin▁of▁sentence｜>",  # noqa: RUF001 - DeepSeek spells it so
    "[CLS]",
    "<|bos|>",
    "[BOS]",
)


def byte_characters() -> list[str]:
    """The character that stands for each byte 0..255 in byte-level vocabularies.

    Printable bytes of Latin-1 stand for themselves, the others are numbered from U+0100 (GPT-2,
    src/encoder.py).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


# Ids below this may have holes between them; of larger ones a file has at least a byte for each
SPARSE_IDS = 2**20
BYTE_CHARACTERS = byte_characters()
# Those that occur in UTF-8: vocabularies made from texts may lack the others.
TEXT_CHARACTERS = BYTE_CHARACTERS[:0xC0] + BYTE_CHARACTERS[0xC2:0xF5]
BYTE_OF = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


# Options of a model that draw one of several encodings: BPE-dropout (arXiv 1910.13267), and
# subword regularization of Unigram (arXiv 1804.10959).
SAMPLING = ("dropout", "alpha", "nbest_size")


@dataclass(frozen=True)
class AddedToken:
    """A token matched in the text before the model sees it.

    stretches: it may take the spaces beside it, or needs word boundaries.
    """

    id: int
    content: str
    special: bool
    normalized: bool
    stretches: bool


class Description:
    """The parts of a tokenizer.json that nextpt decides by.

    Options that make encoding random are left out, with a warning: the same text has to give the
    same tokens.

    Attributes:
        cleared: Names of the options that were left out.

    Args:
        content: Parsed JSON.
        path: Of the file, for messages.

    Raises:
        DataPrepError: When the content is not a tokenizer.json.
    """

    def __init__(self, content: Any, path: Path) -> None:
        try:
            self.content, self.cleared = _without_sampling(content)
            self.model: dict[str, Any] = self.content["model"]
            self.kind: str = self.model.get("type") or "BPE"
            self.added = [
                AddedToken(
                    t["id"],
                    t["content"],
                    t["special"],
                    t["normalized"],
                    t["single_word"] or t["lstrip"] or t["rstrip"],
                )
                for t in self.content.get("added_tokens", [])
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise DataPrepError(
                f"{path} is not a tokenizer.json ({type(error).__name__}: {error}); {OTHERS}"
            ) from error
        self.path = path
        if self.cleared:
            warnings.warn(
                f"{path}: {', '.join(self.cleared)} makes encoding random and is ignored",
                InputWarning,
                stacklevel=2,
            )
        self.specials = {t.content: t.id for t in self.added if t.special}
        self.literals = {t.content: t.id for t in self.added if not t.special}

    @classmethod
    def read(cls, path: Path) -> Description:
        """Read a file.

        Raises:
            DataPrepError: When it cannot be read or is not a tokenizer.json.
        """
        try:
            text = path.read_text(encoding="utf-8-sig")
            description = cls(json.loads(text), path)
        except (OSError, ValueError, RecursionError) as error:
            raise DataPrepError(f"{path} is not a tokenizer.json: {error}; {OTHERS}") from error
        description.check_ids(max(len(text), SPARSE_IDS))
        return description

    def check_ids(self, limit: int) -> None:
        """Check the ids of all tokens, before anything is allocated for as many tokens.

        Args:
            limit: Bound above every id.

        Raises:
            DataPrepError: There is none, or one is no number from 0 to below the limit.
        """
        try:
            ids = [*self.vocabulary.values(), *(token.id for token in self.added)]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataPrepError(
                f"{self.path} is not a tokenizer.json: its vocabulary cannot be read"
                f" ({type(error).__name__}: {error}); {OTHERS}"
            ) from error
        wrong = [index for index in ids if type(index) is not int or not 0 <= index < limit]
        if wrong or not ids:
            problem = f"a token has the id {wrong[0]!r}" if wrong else "it has no token"
            raise DataPrepError(
                f"{self.path} is damaged: {problem}, expected numbers from 0 to {limit - 1}"
            )

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Token -> id, without tokens that are only added tokens."""
        vocabulary = self.model["vocab"]
        return (
            vocabulary
            if isinstance(vocabulary, dict)
            else {piece: index for index, (piece, _) in enumerate(vocabulary)}
        )

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """Pre-tokenizers in order."""
        return _flat(self.content.get("pre_tokenizer"), "pretokenizers")

    @cached_property
    def byte_level(self) -> bool:
        """Whether it is a BPE over bytes that adds, drops or changes none on the way to the model.

        A normalizer is not considered.
        """
        levels = [s for s in self.steps if s["type"] == "ByteLevel"]
        return (
            self.kind == "BPE"
            and len(levels) == 1
            and not levels[0].get("add_prefix_space", True)
            and all(
                s["type"] in ("ByteLevel", "Digits", "Split", "Punctuation") for s in self.steps
            )
            and not any(s.get("behavior") == "Removed" and not s.get("invert") for s in self.steps)
            and not any(
                self.model.get(k) for k in ("continuing_subword_prefix", "end_of_word_suffix")
            )
            and all(character in self.vocabulary for character in TEXT_CHARACTERS)
        )

    @property
    def characters(self) -> bool:
        """Whether every character is one token, as write_character_tokenizer makes them."""
        return (
            self.kind == "WordLevel"
            and not self.content.get("normalizer")
            and all(len(token) == 1 for token in self.vocabulary)
            and self.model.get("unk_token") not in self.vocabulary
            and [(s["type"], s.get("pattern"), s.get("behavior")) for s in self.steps]
            == [("Split", {"Regex": "(?m:.)"}, "Isolated")]
        )

    @property
    def own_bytes(self) -> bool:
        """Whether a token stands for the same bytes everywhere: byte_counts "table"."""
        plain = not self.content.get("normalizer") and not any(
            t.stretches for t in self.added if not t.special
        )
        return plain and (self.byte_level or self.characters)

    @property
    def name(self) -> str:
        """The kind in words."""
        if self.kind == "BPE" and any(s["type"] == "ByteLevel" for s in self.steps):
            return "byte-level BPE" + ("" if self.own_bytes else " that changes text")
        if self.characters:
            return "characters"
        return (
            "BPE with byte fallback"
            if self.kind == "BPE" and self.model.get("byte_fallback")
            else self.kind
        )

    @cached_property
    def unknown_id(self) -> int | None:
        """Id of the token for text that the vocabulary cannot spell; None if there is none."""
        if self.byte_level:
            return None
        if self.kind == "Unigram":
            return self.model.get("unk_id")
        unknown = self.model.get("unk_token")
        return None if unknown is None else self.vocabulary.get(unknown)

    def start_and_end(self, start: str | None, end: str | None) -> tuple[int, int]:
        """Ids of the tokens put before and after a document.

        They are the named ones, else those of the file's template, else the usual ones.

        Raises:
            DataPrepError: When a named one is not a special token, or none ends a document.
        """
        for name in (start, end):
            if name is not None and name not in self.specials:
                raise DataPrepError(
                    f"{self.path}: {name!r} is not one of its special tokens"
                    f" ({_shown(self.specials)})"
                )
        first, last = self._template()
        end = end or last or next((name for name in ENDS if name in self.specials), None)
        if end is None:
            raise DataPrepError(
                f"{self.path} has no end-of-text token ({END_OF_TEXT} or </s>) among its special"
                f" tokens ({_shown(self.specials)}); name the one that ends a document"
            )
        start = start or first or next((name for name in STARTS if name in self.specials), end)
        return self.specials[start], self.specials[end]

    def with_template(self, start_id: int, end_id: int | None) -> dict[str, Any]:
        """Content of the file with a template that puts these special tokens around a text.

        With end_id None, only the start token before it.
        """
        names = {index: content for content, index in self.specials.items()}
        ids = [start_id] if end_id is None else [start_id, end_id]
        around = {
            names[index]: {"id": names[index], "ids": [index], "tokens": [names[index]]}
            for index in ids
        }
        specials = [{"SpecialToken": {"id": names[index], "type_id": 0}} for index in ids]
        single, pair = (
            [
                specials[0],
                *({"Sequence": {"id": text, "type_id": 0}} for text in texts),
                *specials[1:],
            ]
            for texts in ("A", "AB")
        )
        template = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": pair,
            "special_tokens": around,
        }
        return self.content | {"post_processor": template}

    def _template(self) -> tuple[str | None, str | None]:
        """The special tokens that the post-processor puts before and after a single text."""
        for step in _flat(self.content.get("post_processor"), "processors"):
            if step["type"] in ("BertProcessing", "RobertaProcessing"):
                pieces = [step["cls"][0], None, step["sep"][0]]
            elif step["type"] == "TemplateProcessing":
                pieces = [
                    piece["SpecialToken"]["id"] if "SpecialToken" in piece else None
                    for piece in step["single"]
                ]
            else:
                continue
            first, last = (
                piece if piece in self.specials else None for piece in (pieces[0], pieces[-1])
            )
            return first, last
        return None, None


def _without_sampling(content: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The content without options of random encoding, and the names of those that were set."""
    model = content["model"]
    cleared = [name for name in SAMPLING if model.get(name)]
    if not cleared:
        return content, []
    return content | {"model": model | dict.fromkeys(cleared)}, cleared


def _flat(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if not step:
        return []
    return (
        [inner for part in step[key] for inner in _flat(part, key)]
        if step["type"] == "Sequence"
        else [step]
    )


def _shown(names: dict[str, int]) -> str:
    shown = ", ".join(list(names)[:8]) or "it has none"
    return shown + (", ..." if len(names) > 8 else "")
