"""Tokenizer files: start and end tokens, refused files, training, copies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_prep.tokenizer import Tokenizer, evenly_sampled, train_bpe
from data_prep.tokenizer.description import SPARSE_IDS, Description
from nextpt.base.errors import DataPrepError
from tests.support.tokenizers import TEXTS


@pytest.mark.thorough
def test_start_and_end(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    usual = {kind: [t.token(i) for i in (t.start_id, t.end_id)] for kind, t in tokenizers.items()}
    assert usual["byte_level"] == usual["characters"] == ["<|endoftext|>"] * 2
    assert (
        usual["llama"] == ["<s>", "</s>"]
        and usual["unigram"] == ["</s>", "</s>"]
        and usual["wordpiece"] == ["[CLS]", "[SEP]"]
    )
    named = Tokenizer(tokenizers["wordpiece"].path, start="[MASK]", end="[PAD]")
    named.copy_to(tmp_path / "copy.json")
    copied = Tokenizer(tmp_path / "copy.json")
    assert (copied.start_id, copied.end_id) == (named.start_id, named.end_id) == (4, 0)
    assert copied.encode(TEXTS[0]).tolist() == named.encode(TEXTS[0]).tolist()
    tokenizers["llama"].copy_to(tmp_path / "same.json")
    assert (tmp_path / "same.json").read_bytes() == tokenizers["llama"].path.read_bytes()
    with pytest.raises(
        DataPrepError, match=r"'<bos>' is not one of its special tokens \(<unk>, <s>, </s>\)"
    ):
        Tokenizer(tokenizers["llama"].path, start="<bos>")


def with_vocabulary(vocabulary: str) -> str:
    model = f'{{"type": "BPE", "vocab": {vocabulary}, "merges": []}}'
    return f'{{"model": {model}, "added_tokens": []}}'


def test_ids_with_holes_are_read_and_more_than_the_file_can_hold_refused(tmp_path: Path) -> None:
    """Nothing is allocated for as many tokens as an id claims."""
    path = tmp_path / "tokenizer.json"
    train_bpe(TEXTS, 300, path)
    content = json.loads(path.read_text())
    end = content["added_tokens"][-1]
    end["id"] = SPARSE_IDS - 1
    content["model"]["vocab"].pop(end["content"], None)
    path.write_text(json.dumps(content))
    assert Description.read(path).added[-1].id == SPARSE_IDS - 1
    end["id"] = SPARSE_IDS
    path.write_text(json.dumps(content))
    with pytest.raises(DataPrepError, match=f"the id {SPARSE_IDS}, expected numbers from 0 to"):
        Tokenizer(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a tokenizer.json"),
        ("[]", "is not a tokenizer.json"),
        ('{"model": {"type": "BPE"}}', "is not a tokenizer.json"),
        (
            (
                '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]},'
                ' "added_tokens": []}'
            ),
            "the tokenizers library reads",
        ),
        (
            (
                '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},'
                ' "added_tokens": []}'
            ),
            "no end-of-text token",
        ),
        ("[" * 100_000, "is not a tokenizer.json"),
        (with_vocabulary('{"a": 4000000000}'), "a token has the id 4000000000, expected numbers"),
        (with_vocabulary('{"a": -1}'), "a token has the id -1"),
        (with_vocabulary('{"a": "0"}'), "a token has the id '0'"),
        (with_vocabulary('{"a": true}'), "a token has the id True"),
        (with_vocabulary("{}"), "it has no token"),
        (with_vocabulary("7"), "its vocabulary cannot be read"),
    ],
)
def test_files_that_are_no_tokenizer_are_refused(
    tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(DataPrepError, match=message) as raised:
        Tokenizer(path)
    assert "bad.json" in str(raised.value) and "\n" not in str(raised.value)


def test_trained_tokenizers_are_encoded_by_tiktoken(tmp_path: Path) -> None:
    train_bpe(TEXTS, 300, tmp_path / "tokenizer.json")
    assert Tokenizer(tmp_path / "tokenizer.json").encoder == "tiktoken"
    before = (tmp_path / "tokenizer.json").read_bytes()
    with pytest.raises(DataPrepError, match="only"):
        train_bpe(TEXTS, 10**6, tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == before and len(
        list(tmp_path.iterdir())
    ) == 1


def test_samples_are_even_bounded_and_the_same_in_any_order() -> None:
    texts = [f"{domain}{i} " * 50 for domain in "ab" for i in range(2000)]
    total = sum(map(len, texts))
    sample = evenly_sampled(texts, total // 8)
    size = sum(map(len, sample))
    assert total // 17 < size <= total // 8
    assert 0.35 < sum(text.startswith("a") for text in sample) / len(sample) < 0.65
    assert 0.45 < sum(map(len, evenly_sampled(texts, int(total * 0.6)))) / total < 0.55
    assert sorted(evenly_sampled(reversed(texts), total // 8)) == sorted(sample)
    assert evenly_sampled(texts, total) == texts
    huge = "".join(f"{i} " for i in range(300_000))
    assert 2**17 < sum(map(len, evenly_sampled([huge], 2**19))) <= 2**19
    assert evenly_sampled(["same"] * 100, 50) == []


def test_copies_in_another_folder_give_the_same_tokenizer(
    tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    shutil.copy(tokenizers["neox"].path, tmp_path / "tokenizer.json")
    assert Tokenizer(tmp_path / "tokenizer.json").sha256 == tokenizers["neox"].sha256


def test_two_tokens_with_one_id_are_encoded_by_the_tokenizers_library(tmp_path: Path) -> None:
    """Tiktoken panics on such ranks, with an exception that is none of Python's Exceptions."""
    path = tmp_path / "tokenizer.json"
    train_bpe(TEXTS, 420, path)
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["b"] = vocabulary["a"]
    path.write_text(json.dumps(content))
    tokenizer = Tokenizer(path)
    assert tokenizer.encode("cab").tolist() == [vocabulary[c] for c in "caa"]
