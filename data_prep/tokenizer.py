"""Byte-level BPE tokenizers: training, encoding, and how many bytes each token stands for."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from data_prep.errors import PrepError
from data_prep.files import sha256_file

END_OF_TEXT = "<|endoftext|>"
# Words with one leading space or symbol, digits in threes, runs of symbols, indentation (the pattern of GPT-4's
# cl100k_base, as published in tiktoken).
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SMALLEST_VOCABULARY = 257  # 256 bytes and the end of text


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path, *, total: int | None = None) -> None:
    """Train a byte-level BPE on `texts` and write tokenizer.json. Every byte is a token, so nothing is unknown.

    Raises PrepError when vocab_size is too small, or larger than the texts can fill.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise PrepError(f"vocab_size = {vocab_size} is too small: 256 bytes and the end of text need {SMALLEST_VOCABULARY}")
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer, length=total)
    if tokenizer.get_vocab_size() < vocab_size:
        raise PrepError(
            f"the texts give only {tokenizer.get_vocab_size()} tokens, fewer than vocab_size = {vocab_size}: "
            "ask for fewer or give more text"
        )
    tokenizer.save(str(path))


def write_character_tokenizer(texts: Iterable[str], path: Path) -> None:
    """Write a tokenizer.json in which every character of `texts` is a token, in order of code point, the end of text last.

    It spells nothing else: a text with another character is refused when it is encoded. Raises PrepError without a text.
    """
    characters = sorted(set().union(*texts))
    if not characters:
        raise PrepError("the texts hold no character to make tokens of")
    tokenizer = HFTokenizer(models.WordLevel({character: index for index, character in enumerate(characters)}, unk_token="unknown"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?m:.)"), behavior="isolated")  # onig's m: the dot is any character
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.save(str(path))


class Tokenizer:
    """A tokenizer.json, and what nextpt needs to know of it. Text that spells a special token stays text."""

    def __init__(self, path: Path) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        if not path.is_file():
            raise PrepError(f"tokenizer {path} does not exist")
        try:
            self._tokenizer = HFTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise PrepError(f"{path} is not a tokenizer.json that the tokenizers library reads: {error}") from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.path, self.sha256 = path, sha256_file(path)
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.start_id = self.end_id = self._end_of_text()

    def _end_of_text(self) -> int:
        specials = {t.content: i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special}
        for name in (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>"):
            if name in specials:
                return specials[name]
        raise PrepError(f"{self.path} has no end-of-text token ({END_OF_TEXT} or </s>) among its special tokens")

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, uint32, without start and end."""
        try:
            encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:
            raise PrepError(f"the tokenizer {self.path} refuses a text: {error}") from error
        return [np.asarray(e.ids, dtype=np.uint32) for e in encoded]

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the tokens, special ones left out. Bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        """uint16 [V]: UTF-8 bytes each token stands for; 0 for special tokens and holes in the vocabulary.

        Raises PrepError for a tokenizer that is neither byte-level nor one of characters: there the bytes of a token
        depend on its place.
        """
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=False)
        characters = isinstance(self._tokenizer.model, models.WordLevel) and all(len(token) == 1 for token in vocabulary)
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        specials = {i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special}
        added = {i: t.content for i, t in self._tokenizer.get_added_tokens_decoder().items()}
        sizes = np.zeros(self.vocab_size, dtype=np.uint16)
        for token, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if index in specials:
                continue
            if index in added:
                sizes[index] = len(added[index].encode())
            elif characters:
                sizes[index] = len(token.encode())
            elif set(token) <= alphabet:
                sizes[index] = len(token)  # byte-level: one character of the token per byte
            else:
                raise PrepError(f"{self.path} is neither byte-level nor one of characters (token {token!r}), so its tokens have no "
                                "byte count of their own")
        return sizes
