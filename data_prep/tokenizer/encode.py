"""Encoding and decoding with a tokenizer.json of any kind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Encoding
from tokenizers import Tokenizer as HFTokenizer

from data_prep.tokenizer.adversarial import adversarial_texts
from data_prep.tokenizer.byte_counts import sizes_from_offsets, token_lengths, token_spellings
from data_prep.tokenizer.description import Description
from data_prep.tokenizer.respell import Respeller
from data_prep.tokenizer.tiktoken_encoder import NotEligibleError, TiktokenEncoder
from nextpt.base.errors import DataPrepError
from nextpt.base.files import atomic_write, sha256_file

COMPARED = 256  # texts per call when the two libraries are compared
# What `Tokenizer._choose` found on the fixed set of texts, by the hash of the tokenizer.json
_differences: dict[str, str | None] = {}


class Tokenizer:
    """A tokenizer.json, opened for encoding and decoding.

    Text that spells a special token is encoded as text.

    Attributes:
        path: The file.
        sha256: Its hash.
        vocab_size: Largest id + 1.
        start_id: Token put before a document.
        end_id: Token put after a document.
        encoder: Library that encodes.
        encoder_reason: Why that library.
        byte_counts: "table" when a token stands for the same bytes everywhere, else "column" (see
            data_prep.format).
        library: The tokenizer as the tokenizers library has it.
    """

    def __init__(
        self,
        path: Path,
        *,
        encoder: Literal["auto", "tiktoken", "tokenizers"] = "auto",
        start: str | None = None,
        end: str | None = None,
    ) -> None:
        """Open a tokenizer.json.

        Args:
            path: The file.
            encoder: "auto" takes tiktoken, which is several times as fast, where it gives the same
                tokens.
            start: Content of the start token; by default that of the file's template, or the usual
                one.
            end: Content of the end token; by default that of the file's template, or the usual one.

        Raises:
            DataPrepError: When the file is not a tokenizer.json, a special token does not exist, or
                `encoder` is "tiktoken" and would differ.
        """
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        if not path.is_file():
            raise DataPrepError(f"tokenizer {path} does not exist")
        description = Description.read(path)
        self._description = description
        self._added = {token.id: token.content for token in description.added}
        self.library = _open_library(path)
        for option in description.cleared:
            setattr(self.library.model, option, None)
        self.path = path
        self.sha256 = sha256_file(path)
        self.vocab_size = (
            max([*description.vocabulary.values(), *(t.id for t in description.added)]) + 1
        )
        self.start_id, self.end_id = description.start_and_end(start, end)
        self.byte_counts: Literal["table", "column"] = (
            "table" if description.own_bytes else "column"
        )
        self._lengths = token_lengths(description, self.vocab_size)
        self._respell = Respeller(description, self.library, self.vocab_size)
        self._fast, self.encoder_reason = self._choose(encoder)
        self.encoder: Literal["tiktoken", "tokenizers"] = "tiktoken" if self._fast else "tokenizers"

    def _choose(self, encoder: str) -> tuple[TiktokenEncoder | None, str]:
        """(tiktoken's encoder where it is allowed and equal, else None; the reason)."""
        if encoder == "tokenizers":
            return None, "asked for"
        try:
            fast = TiktokenEncoder(self._description, self.library)
            if self.sha256 not in _differences:
                _differences[self.sha256] = self._compare(fast, adversarial_texts())
            if difference := _differences[self.sha256]:
                raise NotEligibleError(f"tiktoken differs from it on {difference}")
        except NotEligibleError as reason:
            if encoder == "tiktoken":
                raise DataPrepError(
                    f"{self.path} cannot be encoded by tiktoken: {reason}"
                ) from None
            return None, str(reason)
        return fast, "same merges, and the same tokens on the fixed set of difficult texts"

    @property
    def kind(self) -> str:
        """The kind in words."""
        return self._description.name

    def difference(self, texts: Iterable[str]) -> str | None:
        """First of `texts` on which the two libraries differ, shortened for display.

        None when there is none, or only one library is in use.
        """
        return self._compare(self._fast, texts) if self._fast else None

    def _compare(self, fast: TiktokenEncoder, texts: Iterable[str]) -> str | None:
        for group in _groups(texts, COMPARED):
            for text, slow in zip(group, self._encode_by_library(group), strict=True):
                ids = fast.encode(text)
                if ids is not None and not np.array_equal(ids, slow):
                    return _show_difference(text, ids, slow)
        return None

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, uint32, without start and end.

        Raises:
            DataPrepError: For a text that cannot be encoded.
        """
        if self._fast is None:
            return self._encode_by_library(texts)
        return [self.encode(text) for text in texts]

    def encode(self, text: str) -> np.ndarray:
        """Token ids, uint32 [n], without start and end.

        Raises:
            DataPrepError: For a text that cannot be encoded.
        """
        if self._fast is not None:
            ids = self._fast.encode(text)
            if ids is not None:
                return ids
        return self._encode_by_library([text])[0]

    def _encode_by_library(self, texts: list[str]) -> list[np.ndarray]:
        try:
            encoded = self.library.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise DataPrepError(f"the tokenizer {self.path} refuses a text: {error}") from error
        ids_of_texts = [np.array(e.ids, dtype=np.uint32) for e in encoded]
        return [
            self._with_offsets(text)[0] if self._respell.suspects(text, ids) else ids
            for text, ids in zip(texts, ids_of_texts, strict=True)
        ]

    def _with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids uint32 [n] and their positions int64 [n, 2], characters [start, stop) of the text."""
        try:
            encoded: Encoding = self.library.encode(text, add_special_tokens=False)
        except Exception as error:
            raise DataPrepError(f"the tokenizer {self.path} refuses a text: {error}") from error
        ids = np.array(encoded.ids, dtype=np.uint32)
        offsets = np.array(encoded.offsets, dtype=np.int64).reshape(-1, 2)
        return (
            self._respell(text, ids, offsets)
            if self._respell.suspects(text, ids)
            else (ids, offsets)
        )

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Encode a text, and count the bytes that each token stands for.

        Returns:
            Ids uint32 [n], and sizes uint32 [n + 1]: UTF-8 bytes of `text` that each token stands
            for, the end token's last. Sizes sum to the bytes of the text. The end token has 0,
            unless the document has no other token.
        """
        ids = self._fast.encode(text) if self._fast is not None else None
        if ids is None and self.byte_counts == "table":
            ids = self._encode_by_library([text])[0]
        if ids is None:
            ids, offsets = self._with_offsets(text)
            return ids, sizes_from_offsets(text, offsets)
        sizes = np.append(self._lengths[ids].astype(np.uint32), np.uint32(0))
        if int(sizes.sum()) != len(text.encode()):
            raise DataPrepError(
                f"the tokenizer {self.path} drops text: its tokens stand for {int(sizes.sum())} of"
                f" {len(text.encode())} bytes"
            )
        return ids, sizes

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the tokens, without special ones. Bytes that are not UTF-8 become U+FFFD."""
        return self.library.decode([int(i) for i in ids], skip_special_tokens=True)

    def token(self, index: int) -> str | None:
        """How the vocabulary spells a token; None for a hole.

        An added token is spelled as in the file: the library may know it by its normalized form.
        """
        return self._added.get(index) or self.library.id_to_token(index)

    def token_bytes(self) -> np.ndarray:
        """uint16 [V]: UTF-8 bytes that each token stands for; 0 for special tokens and holes.

        Exact when byte_counts is "table". When it is "column" they only tell text (at least 1) from
        special tokens.
        """
        return self._lengths.copy()

    def spellings(self) -> list[bytes]:
        """Bytes that each token is spelled with.

        Empty for special tokens, and for all tokens of a tokenizer that knows no bytes.
        """
        return token_spellings(self._description, self.vocab_size)

    def copy_to(self, path: Path) -> None:
        """Write the tokenizer.json to `path` with its start and end tokens in the template.

        So opening it without further arguments gives the same start and end.
        """
        opened = self._description.start_and_end(None, None)
        if opened == (self.start_id, self.end_id) and not self._description.cleared:
            shutil.copyfile(self.path, path)
            return
        with atomic_write(path) as file:
            json.dump(
                self._description.with_template(self.start_id, self.end_id),
                file,
                ensure_ascii=False,
            )

    def write_with_start(self, path: Path) -> None:
        """Write the tokenizer.json to `path` for other programs.

        They will put the start token before a text and nothing after it.
        """
        with atomic_write(path) as file:
            json.dump(
                self._description.with_template(self.start_id, None), file, ensure_ascii=False
            )


def _open_library(path: Path) -> HFTokenizer:
    try:
        library = HFTokenizer.from_str(path.read_text(encoding="utf-8-sig"))
    except Exception as error:  # the library raises bare Exception
        raise DataPrepError(
            f"{path} is not a tokenizer.json that the tokenizers library reads: {error}"
        ) from error
    library.encode_special_tokens = True
    library.no_padding()
    library.no_truncation()
    library.post_processor = None  # it adds tokens and trims spaces off offsets
    return library


def _groups(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    stream = iter(texts)
    while group := list(islice(stream, size)):
        yield group


def _show_difference(text: str, ids: np.ndarray, slow: np.ndarray) -> str:
    same = next(
        (i for i, (a, b) in enumerate(zip(ids, slow, strict=False)) if a != b),
        min(len(ids), len(slow)),
    )
    shown = repr(text if len(text) <= 60 else text[:60] + "...")
    return (
        f"{shown}: from token {same} on {ids[same : same + 4].tolist()} by tiktoken,"
        f" {slow[same : same + 4].tolist()} by tokenizers"
    )
