"""Conversion of published tokenizer formats to tokenizer.json, the only format that nextpt reads.

Accepted are tokenizer.json itself, tiktoken's rank files and its encodings by name, GPT-2's pair of
files, and Mistral's tekken.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import json
import lzma
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from tokenizers import Tokenizer as HFTokenizer

from data_prep.tokenizer.adversarial import adversarial_texts
from data_prep.tokenizer.description import BYTE_CHARACTERS, END_OF_TEXT, Description
from data_prep.tokenizer.patterns import PATTERNS, SPECIALS, for_oniguruma
from data_prep.tokenizer.tiktoken_encoder import last_pair
from nextpt.base.errors import DataPrepError
from nextpt.base.files import atomic_write, expand_home

# Mistral's special tokens 0, 1, ... where a tekken file does not list them (mistral-common,
# tokens/tokenizers/tekken.py).
TEKKEN_SPECIALS = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
)
EXPECTED = (
    "expected tokenizer.json, a .tiktoken file of ranks, a folder with encoder.json and vocab.bpe,"
    " tekken.json, or the name of a tiktoken encoding"
    f" ({', '.join(tiktoken.list_encoding_names())})"
)


@dataclass(frozen=True)
class Ranks:
    """A tiktoken-style encoding.

    Attributes:
        mergeable: Bytes -> id, in the order of merging.
        pattern: Regular expression that cuts text before merging.
        specials: Content -> id of the special tokens.
    """

    mergeable: dict[bytes, int]
    pattern: str
    specials: dict[str, int]


def convert(
    source: str,
    output: Path,
    *,
    pattern: str | None = None,
    specials: Iterable[str] = (),
    start: str | None = None,
    end: str | None = None,
) -> None:
    """Write the tokenizer.json that encodes as `source` does.

    Args:
        source: A file, a folder, or the name of a tiktoken encoding.
        output: File to write.
        pattern: For a file of ranks, one of PATTERNS by name or a regular expression.
        specials: Special tokens of a file of ranks, "TOKEN" or "TOKEN=ID".
        start: Special token that begins a document, where it is not the usual one.
        end: Special token that ends a document, where it is not the usual one.

    Raises:
        DataPrepError: With file and line; then nothing is written.
    """
    source = expand_home(source)
    content = _content(source, pattern, list(specials))
    description = Description(content, Path(source))
    chosen = description.start_and_end(start, end)
    content = description.with_template(*chosen) if start or end else description.content
    text = json.dumps(content, ensure_ascii=False)
    try:
        HFTokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise DataPrepError(
            f"{source} is not a tokenizer.json that the tokenizers library reads: {error}"
        ) from error
    try:
        with atomic_write(output) as file:
            file.write(text)
    except OSError as error:
        raise DataPrepError(f"{output} cannot be written: {error.strerror}") from error


def _content(source: str, pattern: str | None, specials: list[str]) -> dict[str, Any]:
    """Content of the tokenizer.json."""
    path = Path(source)
    if path.is_dir():
        path = _in_folder(path)
    if not path.exists():
        if source not in tiktoken.list_encoding_names():
            raise DataPrepError(f"{source} does not exist; {EXPECTED}")
        return _from_ranks(_by_name(source), source)
    if path.name.endswith("vocab.bpe") or path.name == "merges.txt":
        return _gpt2_pair(_partner(path), path)
    data = _read(path)
    if data.lstrip()[:1] != b"{":
        return _from_ranks(_rank_file(path, data, pattern, specials), source)
    if pattern or specials:
        raise DataPrepError(
            f"{path} has its own pattern and special tokens; --pattern and --special are for files"
            " of ranks"
        )
    try:
        content = json.loads(data)
    except ValueError as error:
        raise DataPrepError(f"{path} is not JSON: {error}") from error
    if isinstance(content.get("model"), dict):
        tokenizer: dict[str, Any] = content
        return tokenizer
    if isinstance(content.get("vocab"), list) and "config" in content:
        return _from_ranks(_tekken(content, path), source)
    if content and all(isinstance(value, int) for value in content.values()):
        return _gpt2_pair(path, _partner(path))
    raise DataPrepError(f"{path} is no tokenizer that nextpt knows; {EXPECTED}")


def _in_folder(folder: Path) -> Path:
    for pattern in ("tokenizer.json", "*vocab.bpe", "merges.txt", "*tekken*.json*", "*.tiktoken"):
        matches = sorted(folder.glob(pattern))
        if len(matches) > 1:
            raise DataPrepError(
                f"folder {folder} holds several tokenizers ({', '.join(p.name for p in matches)}):"
                " name one"
            )
        if matches:
            return matches[0]
    raise DataPrepError(f"folder {folder} holds no tokenizer; {EXPECTED}")


def _partner(path: Path) -> Path:
    """The other file of GPT-2's pair.

    gpt2_encoder.json and gpt2_vocab.bpe, or vocab.json and merges.txt.
    """
    for suffix, partner_suffix in (
        ("encoder.json", "vocab.bpe"),
        ("vocab.json", "merges.txt"),
        ("vocab.bpe", "encoder.json"),
        ("merges.txt", "vocab.json"),
    ):
        if path.name.endswith(suffix):
            partner = path.with_name(path.name.removesuffix(suffix) + partner_suffix)
            if not partner.is_file():
                raise DataPrepError(
                    f"{path} needs {partner.name} beside it, the other file of GPT-2's pair"
                )
            return partner
    raise DataPrepError(
        f"{path} looks like a vocabulary of GPT-2's pair; name it encoder.json, with vocab.bpe"
        " beside it"
    )


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        data = lzma.decompress(data) if path.suffix == ".xz" else data
        return data.removeprefix(codecs.BOM_UTF8)
    except (OSError, lzma.LZMAError) as error:
        raise DataPrepError(f"{path} cannot be read: {error}") from error


def _by_name(name: str) -> Ranks:
    try:
        encoding = tiktoken.get_encoding(name)
    # Requests raises many kinds, and tiktoken ValueError for a damaged file
    except Exception as error:
        raise DataPrepError(
            f"tiktoken cannot fetch the encoding {name} ({type(error).__name__}): it needs the"
            " network, or a copy in the folder that TIKTOKEN_CACHE_DIR names; or give a file:"
            f" nextpt tokenizer convert {name}.tiktoken"
        ) from error
    return Ranks(encoding._mergeable_ranks, encoding._pat_str, encoding._special_tokens)


def _rank_file(path: Path, data: bytes, pattern: str | None, specials: list[str]) -> Ranks:
    name = path.name.removesuffix(".tiktoken")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DataPrepError(
                f"{path}:{number}: expected a token in base64 and its rank, not {line[:40]!r};"
                f" {EXPECTED}"
            ) from None
    if pattern is None and name not in PATTERNS:
        raise DataPrepError(
            f"{path} holds ranks and no pattern: give --pattern, one of {', '.join(PATTERNS)}, or a"
            " regular expression"
        )
    chosen = (
        _named_specials(specials, max(ranks.values(), default=0))
        or SPECIALS.get(name)
        or {END_OF_TEXT: max(ranks.values(), default=0) + 1}
    )
    return Ranks(ranks, PATTERNS.get(pattern or name, pattern or ""), chosen)


def _named_specials(specials: list[str], largest: int) -> dict[str, int]:
    """Ids of "TOKEN=ID" or "TOKEN", which takes the next id."""
    named: dict[str, int] = {}
    for item in specials:
        content, equals, index = item.rpartition("=")
        if equals and index.isdigit():
            named[content] = int(index)
        else:
            named[item] = max([largest, *named.values()]) + 1
    return named


def _tekken(content: dict[str, Any], path: Path) -> Ranks:
    """Mistral's format: special tokens, then the ranks that default_vocab_size leaves room for."""
    try:
        config = content["config"]
        count, size = int(config["default_num_special_tokens"]), int(config["default_vocab_size"])
        listed = content.get("special_tokens") or [
            {"rank": rank, "token_str": name} for rank, name in enumerate(TEKKEN_SPECIALS[:count])
        ]
        names = {rank: f"<SPECIAL_{rank}>" for rank in range(count)} | {
            entry["rank"]: entry["token_str"] for entry in listed
        }
        ranks = {
            base64.b64decode(entry["token_bytes"]): entry["rank"] + count
            for entry in content["vocab"]
            if entry["rank"] < size - count
        }
        return Ranks(ranks, config["pattern"], {name: rank for rank, name in names.items()})
    except (KeyError, TypeError, ValueError) as error:
        raise DataPrepError(
            f"{path} is not a tekken file as mistral-common reads it: {type(error).__name__}"
            f" {error}"
        ) from error


def _gpt2_pair(encoder: Path, merges: Path) -> dict[str, Any]:
    try:
        vocabulary: dict[str, int] = json.loads(_read(encoder))
        lines = _read(merges).decode().splitlines()
    except ValueError as error:
        raise DataPrepError(f"{encoder} and {merges} are not GPT-2's pair: {error}") from error
    pairs: list[list[str]] = []
    for number, line in enumerate(lines, 1):
        if not line or (number == 1 and line.startswith("#")):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or "".join(pair) not in vocabulary:
            raise DataPrepError(
                f"{merges}:{number}: expected two parts of a token of {encoder.name}, not"
                f" {line[:40]!r}"
            )
        pairs.append(pair)
    spelled = {*BYTE_CHARACTERS, *("".join(pair) for pair in pairs)}
    specials = {token: index for token, index in vocabulary.items() if token not in spelled}
    return _byte_level(vocabulary, pairs, specials, PATTERNS["gpt2"], ignore_merges=False)


def _from_ranks(ranks: Ranks, source: str) -> dict[str, Any]:
    """tokenizer.json of an encoding, verified against tiktoken.

    Both are compared on the adversarial texts and on every token's own text.

    Raises:
        DataPrepError: When they differ.
    """
    if lacking := [byte for byte in range(256) if bytes([byte]) not in ranks.mergeable]:
        raise DataPrepError(
            f"{source} has no token for byte {lacking[0]:#04x} ({len(lacking)} are lacking);"
            " tiktoken needs all 256"
        )
    ids = [*ranks.mergeable.values(), *ranks.specials.values()]
    if len(set(ids)) != len(ids):
        raise DataPrepError(
            f"{source} gives two tokens one id; special tokens:"
            f" {', '.join(f'{t}={i}' for t, i in list(ranks.specials.items())[:8])}"
        )
    vocabulary, pairs = dict(ranks.specials), []
    for token, rank in sorted(ranks.mergeable.items(), key=lambda item: item[1]):
        spelled = _characters(token)
        if spelled in ranks.specials:
            raise DataPrepError(f"{source}: {spelled!r} is both a special token and one of bytes")
        vocabulary[spelled] = rank
        if pair := last_pair(token, ranks.mergeable):
            pairs.append([_characters(part) for part in pair])
    content = _byte_level(
        vocabulary, pairs, ranks.specials, for_oniguruma(ranks.pattern), ignore_merges=True
    )
    _compare(content, ranks, source)
    return content


def _compare(content: dict[str, Any], ranks: Ranks, source: str) -> None:
    try:
        encoding = tiktoken.Encoding(
            source, pat_str=ranks.pattern, mergeable_ranks=ranks.mergeable, special_tokens={}
        )
        library = HFTokenizer.from_str(json.dumps(content))
    # Both raise bare Exception or ValueError for a pattern that they cannot read
    except Exception as error:
        raise DataPrepError(
            f"{source}: the pattern {ranks.pattern!r} cannot be read: {error}"
        ) from error
    library.encode_special_tokens = True
    texts = [*adversarial_texts(), *(token.decode("utf-8", "replace") for token in ranks.mergeable)]
    for text, encoded in zip(
        texts, library.encode_batch_fast(texts, add_special_tokens=False), strict=True
    ):
        if not np.array_equal(encoding.encode_to_numpy(text, disallowed_special=()), encoded.ids):
            raise DataPrepError(
                f"{source}: the tokenizers library reads the pattern {ranks.pattern!r} otherwise"
                f" than tiktoken, or it leaves out text: they differ on {text[:40]!r}"
            )


def _characters(token: bytes) -> str:
    return "".join(BYTE_CHARACTERS[byte] for byte in token)


def _byte_level(
    vocabulary: dict[str, int],
    merges: list[list[str]],
    specials: dict[str, int],
    pattern: str,
    *,
    ignore_merges: bool,
) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE.

    ignore_merges: take what is one token between two cuts whole, as tiktoken does.
    """
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": content} | flags
            for content, index in sorted(specials.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
