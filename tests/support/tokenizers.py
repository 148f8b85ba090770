"""A small tokenizer of every kind, made with the tokenizers library."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as HFTokenizer

from data_prep.tokenizer import train_bpe, write_character_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog.\n\nIt's 12345 o'clock;   don't   panic!  \r\n",
    "def f(x):\n    if x > 10:\n        return x ** 2\n    return None  # done\n" * 3,
    (
        "Na\u00efve caf\u00e9s serve cr\u00e8me br\u00fbl\u00e9e \u2014 \u201cvraiment\u201d \u2026"
        " \u4f60\u597d\u4e16\u754c \U0001f600\U0001f44d \u05e9\u05dc\u05d5\u05dd"
    ),
    (
        "words other things under thunder winter inner in the nether weather rather other mother"
        " brother there here where"
    ),
]


def _byte_level(path: Path) -> None:
    train_bpe(TEXTS, 420, path)


def _gpt2(path: Path) -> None:
    """As GPT-2: the pattern is ByteLevel's own."""
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    _train(tokenizer, trainers.BpeTrainer, ["<|endoftext|>"], 400)
    tokenizer.save(str(path))


def _neox(path: Path) -> None:
    """As GPT-NeoX-20B: normal form C, and runs of spaces as added tokens that are not special."""
    _gpt2(path)
    tokenizer = HFTokenizer.from_file(str(path))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in range(8, 1, -1)])
    tokenizer.save(str(path))


def _prefix_space(path: Path) -> None:
    """As RoBERTa: a space before the text that is not in it."""
    _gpt2(path)
    tokenizer = HFTokenizer.from_file(str(path))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.save(str(path))


def _whole(path: Path) -> None:
    """As converted tiktoken encodings: a token that no merging reaches counts between two cuts."""
    train_bpe(TEXTS, 420, path)
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["ignore_merges"] = True
    content["model"]["vocab"]["\u0120zqzq"] = 420  # " zqzq"
    path.write_text(json.dumps(content), encoding="utf-8")


def _llama(path: Path) -> None:
    """As Llama 2: a mark for spaces, one before the text, and bytes for unknown text."""
    tokenizer = HFTokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=special + [f"<0x{b:02X}>" for b in range(256)],
        limit_alphabet=60,
        show_progress=False,
    )
    words = [w for text in TEXTS for w in text.split(" ")]
    tokenizer.train_from_iterator(words * 2, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in special]
    path.write_text(json.dumps(content), encoding="utf-8")


def _unigram(path: Path) -> None:
    """As T5: compatibility forms folded, and special tokens that are pieces of the model too."""
    tokenizer = HFTokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    tokenizer.save(str(path))


def _wordpiece(path: Path) -> None:
    """As BERT: lower case; accents, control characters and spaces dropped; unknown words."""
    tokenizer = HFTokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    _train(
        tokenizer, trainers.WordPieceTrainer, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], 300
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(path))


def _characters(path: Path) -> None:
    write_character_tokenizer(TEXTS, path)


def _train(
    tokenizer: HFTokenizer, trainer: Callable[..., Any], special: list[str], size: int
) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) if trainer is trainers.BpeTrainer else []
    tokenizer.train_from_iterator(
        TEXTS,
        trainer(
            vocab_size=size, special_tokens=special, show_progress=False, initial_alphabet=alphabet
        ),
    )


KINDS: dict[str, Callable[[Path], None]] = {
    "byte_level": _byte_level,
    "gpt2": _gpt2,
    "whole": _whole,
    "neox": _neox,
    "prefix_space": _prefix_space,
    "llama": _llama,
    "unigram": _unigram,
    "wordpiece": _wordpiece,
    "characters": _characters,
}
# Characters refuses those it has not seen
ANY_TEXT = tuple(kind for kind in KINDS if kind != "characters")

# tiktoken's own forms of the patterns (0.14, tiktoken_ext/openai_public.py), which its published
# encodings bring along.
POSSESSIVE = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "cl100k_base": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+|"
        r" ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ),
}
