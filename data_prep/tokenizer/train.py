"""Training of tokenizers: byte-level BPE, and one token per character."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import xxhash
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from data_prep.tokenizer.description import END_OF_TEXT
from data_prep.tokenizer.patterns import PATTERNS
from nextpt.base.errors import DataPrepError
from nextpt.base.files import atomic_write

SMALLEST_VOCABULARY = 257  # 256 bytes and the end of text
# Characters per piece of a sample: far longer than a word, far shorter than the sample
PIECE = 2**16


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    path: Path,
    *,
    total: int | None = None,
    progress: bool = False,
) -> None:
    """Train a byte-level BPE and write its tokenizer.json.

    Every byte is a token, so no text is unknown.

    Args:
        texts: Training texts.
        vocab_size: Number of tokens.
        path: File to write.
        total: Number of texts, for the progress bar.
        progress: Show progress on a terminal.

    Raises:
        DataPrepError: When vocab_size is too small, or larger than the texts can fill.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise DataPrepError(
            f"vocab_size = {vocab_size} is too small: 256 bytes and the end of text need"
            f" {SMALLEST_VOCABULARY}"
        )
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS["cl100k_base"]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        show_progress=progress,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer, length=total)
    if tokenizer.get_vocab_size() < vocab_size:
        raise DataPrepError(
            f"the texts give only {tokenizer.get_vocab_size()} tokens, fewer than vocab_size ="
            f" {vocab_size}: ask for fewer or give more text"
        )
    with atomic_write(path) as file:
        file.write(tokenizer.to_str(pretty=True))


def evenly_sampled(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Sample about half of `max_bytes` to all of it (UTF-8) of larger corpora; all of smaller ones.

    Pieces of texts are chosen by their hash, so the sample is spread evenly and does not depend on
    the order of the texts. At most max_bytes are held: when that is reached, half of the hashes are
    dropped.
    """
    kept: list[tuple[int, bytes]] = []
    size, limit = 0, 2**64
    for text in texts:
        for start in range(0, len(text), PIECE):
            data = text[start : start + PIECE].encode("utf-8", "replace")
            key = xxhash.xxh64_intdigest(data)
            if key >= limit:
                continue
            kept.append((key, data))
            size += len(data)
            while size > max_bytes and limit > 1:
                limit //= 2
                kept = [(k, d) for k, d in kept if k < limit]
                size = sum(len(d) for _, d in kept)
    return [data.decode() for _, data in kept]


def write_character_tokenizer(texts: Iterable[str], path: Path) -> None:
    """Write a tokenizer.json in which every character of `texts` is a token.

    Tokens are in order of code point, the end of text last. A text with any other character is
    refused when it is encoded.

    Raises:
        DataPrepError: Without a text.
    """
    characters = sorted(set().union(*texts))
    if not characters:
        raise DataPrepError("the texts hold no character to make tokens of")
    tokenizer = HFTokenizer(
        models.WordLevel(
            {character: index for index, character in enumerate(characters)}, unk_token="unknown"
        )
    )
    # onig's m: the dot is any character
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?m:.)"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.save(str(path))
