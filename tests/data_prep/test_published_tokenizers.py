"""Published tokenizers: GPT-2, tekken and GPT-NeoX encode as their own libraries do."""

from __future__ import annotations

import base64
import hashlib
import json
import lzma
import os
from pathlib import Path

import pytest
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from data_prep.tokenizer import Tokenizer, convert
from data_prep.tokenizer.adversarial import adversarial_texts
from tests.support.tokenizers import POSSESSIVE

real = pytest.mark.skipif(
    "NEXTPT_TEST_DATA" not in os.environ,
    reason="NEXTPT_TEST_DATA names no folder of real tokenizers",
)


def real_file(name: str) -> Path:
    return Path(os.environ["NEXTPT_TEST_DATA"]) / "tokenizers" / name


@pytest.mark.thorough
@real
def test_the_real_gpt2(tmp_path: Path) -> None:
    convert(str(real_file("gpt2_encoder.json")), tmp_path / "out.json")
    tokenizer = Tokenizer(tmp_path / "out.json")
    ranks = data_gym_to_mergeable_bpe_ranks(
        str(real_file("gpt2_vocab.bpe")), str(real_file("gpt2_encoder.json"))
    )
    encoding = tiktoken.Encoding(
        "gpt2",
        pat_str=POSSESSIVE["gpt2"],
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 50256},
        explicit_n_vocab=50257,
    )
    assert tokenizer.encode("hello world").tolist() == [31373, 995]  # tiktoken's README
    assert (tokenizer.vocab_size, tokenizer.end_id, tokenizer.encoder) == (50257, 50256, "tiktoken")
    check_real(tokenizer, encoding)


@pytest.mark.thorough
@real
def test_the_real_gpt2_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From copies in tiktoken's cache; tiktoken checks their hashes against OpenAI's files."""
    base = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    for name in ("vocab.bpe", "encoder.json"):
        (tmp_path / hashlib.sha1((base + name).encode()).hexdigest()).write_bytes(
            real_file(f"gpt2_{name}").read_bytes()
        )
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    tokenizers = []
    for source in ("gpt2", str(real_file("gpt2_vocab.bpe"))):
        convert(source, tmp_path / "out.json")
        tokenizers.append(Tokenizer(tmp_path / "out.json"))
    by_name, by_file = tokenizers
    assert (by_name.vocab_size, by_name.end_id, by_name.encoder) == (50257, 50256, "tiktoken")
    assert all(
        by_name.encode(text).tolist() == by_file.encode(text).tolist()
        for text in [*adversarial_texts(), *real_texts()]
    )


@pytest.mark.thorough
@real
def test_the_real_tekken(tmp_path: Path) -> None:
    convert(str(real_file("tekken_240911.json.xz")), tmp_path / "out.json")
    tokenizer = Tokenizer(tmp_path / "out.json")
    content = json.loads(lzma.decompress(real_file("tekken_240911.json.xz").read_bytes()))
    ranks = {
        base64.b64decode(entry["token_bytes"]): entry["rank"] + 1000
        for entry in content["vocab"][: 131072 - 1000]
    }
    encoding = tiktoken.Encoding(
        "tekken", pat_str=content["config"]["pattern"], mergeable_ranks=ranks, special_tokens={}
    )
    # what mistral-common makes of it
    assert [tokenizer.start_id, *tokenizer.encode("Hello world!").tolist(), tokenizer.end_id] == [
        1,
        22177,
        4304,
        1033,
        2,
    ]
    assert (tokenizer.vocab_size, tokenizer.byte_counts, tokenizer.encoder) == (
        131072,
        "table",
        "tiktoken",
    )
    check_real(tokenizer, encoding)


@pytest.mark.thorough
@real
def test_the_real_gpt_neox() -> None:
    tokenizer = Tokenizer(real_file("gptneox_20B_tokenizer.json"))
    assert (tokenizer.encoder, tokenizer.byte_counts, tokenizer.vocab_size) == (
        "tiktoken",
        "column",
        50277,
    )
    texts = [*adversarial_texts(), *real_texts()]
    assert tokenizer.difference(texts) is None
    for text in texts:
        assert int(tokenizer.encode_with_bytes(text)[1].sum()) == len(text.encode())


def real_texts() -> list[str]:
    text = (Path(os.environ["NEXTPT_TEST_DATA"]) / "tinyshakespeare.txt").read_text(
        encoding="utf-8"
    )
    sources = [
        Path(path).read_text(encoding="utf-8")
        for path in (json.__file__, tiktoken.__file__, __file__)
    ]
    return [text[:200_000], *sources]


def check_real(tokenizer: Tokenizer, encoding: tiktoken.Encoding) -> None:
    table = tokenizer.token_bytes()
    for text in [*adversarial_texts(), *real_texts()]:
        ids = tokenizer.encode(text)
        assert ids.tolist() == encoding.encode(text, disallowed_special=())
        assert int(table[ids].sum()) == len(text.encode())
    assert tokenizer.difference([*adversarial_texts(), *real_texts()]) is None
