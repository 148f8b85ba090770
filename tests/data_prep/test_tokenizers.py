"""Tokenizers of every kind: byte counts, special tokens in texts, tiktoken where it is equal."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import normalizers

from data_prep.tokenizer import Tokenizer, convert, tiktoken_encoder
from data_prep.tokenizer.adversarial import adversarial_texts
from data_prep.tokenizer.byte_counts import sizes_from_offsets
from nextpt.base.errors import DataPrepError, InputWarning
from tests.support.tokenizers import ANY_TEXT, KINDS, TEXTS

FAST = ("byte_level", "gpt2", "whole", "neox")
ANY = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
FRAGMENTS = st.lists(st.sampled_from(adversarial_texts()[:120]) | ANY, max_size=6).map("".join)
RUNS = st.builds(
    lambda text, times: text * times, st.text(min_size=1, max_size=3), st.integers(1, 300)
)
TEXT = ANY | FRAGMENTS | RUNS.filter(lambda text: text.isprintable() or text.isascii())


def plain(path: Path) -> HFTokenizer:
    """The tokenizer as users of the tokenizers library open it."""
    library = HFTokenizer.from_file(str(path))
    library.encode_special_tokens = True
    return library


def changed(source: Tokenizer, path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a tokenizer.json with a change in its content."""
    content = json.loads(source.path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def check_bytes(tokenizer: Tokenizer, text: str) -> None:
    ids, sizes = tokenizer.encode_with_bytes(text)
    assert len(sizes) == len(ids) + 1 and sizes.dtype == ids.dtype == np.uint32
    assert int(sizes.sum()) == len(text.encode()) and (sizes[-1] == 0 or len(ids) == 0)
    assert (
        ids.tolist()
        == tokenizer.encode(text).tolist()
        == tokenizer.encode_batch([text, "a", text])[2].tolist()
    )
    table = tokenizer.token_bytes()
    assert (table[ids] > 0).all(), "a special token in a text"
    if tokenizer.byte_counts == "table":
        assert sizes[:-1].tolist() == table[ids].tolist() and tokenizer.decode(ids) == text


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ANY_TEXT)
@settings(max_examples=60, deadline=None)
@given(text=TEXT)
def test_bytes_sum_to_the_text(tokenizers: dict[str, Tokenizer], kind: str, text: str) -> None:
    check_bytes(tokenizers[kind], text)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ANY_TEXT)
def test_bytes_sum_to_difficult_texts(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    for text in adversarial_texts():
        check_bytes(tokenizers[kind], text)


def test_characters_have_the_bytes_of_utf8(tokenizers: dict[str, Tokenizer]) -> None:
    for text in TEXTS:
        check_bytes(tokenizers["characters"], text)
        assert tokenizers["characters"].encode_with_bytes(text)[1].tolist() == [
            len(c.encode()) for c in text
        ] + [0]
    assert tokenizers["characters"].byte_counts == "table"
    with pytest.raises(DataPrepError, match="refuses a text"):
        tokenizers["characters"].encode_with_bytes("\u2603")


def test_every_token_of_bytes_has_its_own(tokenizers: dict[str, Tokenizer]) -> None:
    """Against the library's decoding of a token between two letters, so that no space is lost."""
    for kind in FAST:
        library, table = plain(tokenizers[kind].path), tokenizers[kind].token_bytes()
        for index in range(tokenizers[kind].vocab_size):
            if table[index] and "\ufffd" not in (
                text := library.decode([index], skip_special_tokens=False)
            ):
                assert table[index] == len(text.encode()), (kind, index, text)
        assert int((table == 0).sum()) == 1  # the end of text


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (
            "llama",
            "a\n\U0001f680b",
            [
                ("\u2581", 0),
                ("a", 1),
                ("\n", 1),
                ("<0xF0>", 1),
                ("<0x9F>", 1),
                ("<0x9A>", 1),
                ("<0x80>", 1),
                ("b", 1),
            ],
        ),
        ("wordpiece", "  \u00c9 the  ", [("e", 4), ("the", 6)]),
        ("prefix_space", "th\u00e9", [("\u0120th", 2), ("\u00c3\u00a9", 2)]),
        # A post-processor trims the offsets of spaces, unless it is left out
        ("prefix_space", " a", [("\u0120", 1), ("a", 1)]),
        # the library's offset of a composed character is that of its first: the mark counts as
        # dropped, so it goes to what follows
        ("neox", "e\u0301  th", [("\u00c3\u00a9", 1), ("  ", 4), ("th", 2)]),
    ],
)
def test_bytes_by_position(
    tokenizers: dict[str, Tokenizer], kind: str, text: str, expected: list[tuple[str, int]]
) -> None:
    ids, sizes = tokenizers[kind].encode_with_bytes(text)
    assert tokenizers[kind].byte_counts == "column"
    assert [
        (tokenizers[kind].token(i), size)
        for i, size in zip(ids.tolist(), sizes.tolist(), strict=False)
    ] == expected


def test_a_text_without_tokens_leaves_its_bytes_to_the_end(
    tokenizers: dict[str, Tokenizer],
) -> None:
    ids, sizes = tokenizers["wordpiece"].encode_with_bytes(" \n\0 ")
    assert ids.tolist() == [] and sizes.tolist() == [4]
    assert tokenizers["llama"].encode_with_bytes("")[1].tolist() == [0]


def test_positions_that_decrease_or_repeat() -> None:
    sizes = sizes_from_offsets(
        "abcde\u20ac", np.array([[0, 2], [1, 1], [0, 2], [4, 5], [4, 5], [4, 5], [5, 5]])
    )
    assert sizes.tolist() == [2, 0, 0, 1, 1, 1, 3, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_spelled_in_a_text_are_text(
    tokenizers: dict[str, Tokenizer], kind: str
) -> None:
    tokenizer = tokenizers[kind]
    content = json.loads(tokenizer.path.read_text(encoding="utf-8"))
    specials = {t["content"]: t["id"] for t in content["added_tokens"] if t["special"]}
    unknown = specials.get("<unk>", specials.get("[UNK]"))
    for name in specials:
        for text in (name, f"the{name}the", f"the {name} the", name * 3):
            if kind == "characters":
                with pytest.raises(DataPrepError):  # its characters were not among the texts
                    tokenizer.encode(text)
                continue
            ids = tokenizer.encode(text).tolist()
            assert not set(ids) & (set(specials.values()) - {unknown}), (text, ids)
            check_bytes(tokenizer, text)
    if kind == "unigram":  # here the model itself spells the token, which the library lets through
        assert (
            specials["</s>"]
            in plain(tokenizer.path).encode("the</s>", add_special_tokens=False).ids
        )
        assert len(tokenizer.encode("<unk>")) > 1
    if kind == "wordpiece":  # a word that cannot be spelled is still one token
        assert tokenizer.encode("[UNK] zz\u2603").tolist() == [
            *tokenizer.encode("[UNK]").tolist(),
            specials["[UNK]"],
        ]


@pytest.mark.thorough
@pytest.mark.parametrize("kind", FAST)
@settings(max_examples=100, deadline=None)
@given(text=TEXT)
def test_tiktoken_gives_the_librarys_tokens(
    tokenizers: dict[str, Tokenizer], kind: str, text: str
) -> None:
    tokenizer = tokenizers[kind]
    assert tokenizer.encoder == "tiktoken" and tokenizer.difference([text]) is None
    assert (
        tokenizer.encode(text).tolist()
        == plain(tokenizer.path).encode(text, add_special_tokens=False).ids
    )


def test_other_kinds_use_the_library_with_a_reason(tokenizers: dict[str, Tokenizer]) -> None:
    reasons = {
        kind: tokenizers[kind].encoder_reason
        for kind in KINDS
        if tokenizers[kind].encoder == "tokenizers"
    }
    assert reasons == {
        "prefix_space": "it is byte-level BPE that changes text",
        "llama": "it is BPE with byte fallback",
        "unigram": "it is Unigram",
        "wordpiece": "it is WordPiece",
        "characters": "it is characters",
    }
    assert tokenizers["llama"].difference(["a"]) is None
    assert {kind: tokenizers[kind].byte_counts for kind in FAST} == {
        "byte_level": "table",
        "gpt2": "table",
        "whole": "table",
        "neox": "column",
    }


def swap_merges(content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]
    merges[0], merges[-1] = merges[-1], merges[0]


def add_token_of_two_bytes(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["zq"] = len(content["model"]["vocab"])
    content["model"]["ignore_merges"] = True


def make_a_merged_token_special(content: dict[str, Any]) -> None:
    index = content["model"]["vocab"]["th"]
    content["added_tokens"].append(content["added_tokens"][0] | {"id": index, "content": "th"})


def set_pattern(pattern: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": pattern}

    return change


def add_literal(**flags: bool) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        token = content["added_tokens"][0] | {
            "id": len(content["model"]["vocab"]),
            "content": "==",
            "special": False,
        }
        content["added_tokens"].append(token | flags)

    return change


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (swap_merges, "merges are not in the order"),
        (add_token_of_two_bytes, "tiktoken would merge b'zq'"),
        (make_a_merged_token_special, "a special token of it is also made by merging"),
        # "{1,3}+" repeats for one engine what is possessive for the other, and "$" stands before
        # the end of a line
        (set_pattern(r"\p{N}{1,3}+|\P{N}+"), "differs from it on"),
        (set_pattern(r"\s+$|[^\s]+|\s"), "differs from it on"),
        (set_pattern(r"[a-z]+"), "differs from it on"),
        (add_literal(lstrip=True), "take the spaces beside them"),
        (
            lambda content: content.update(normalizer={"type": "Lowercase"}),
            "it is byte-level BPE that changes text|a normalizer, Lowercase",
        ),
    ],
)
def test_tiktoken_is_not_used_where_it_would_differ(
    tokenizers: dict[str, Tokenizer],
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    reason: str,
) -> None:
    path = changed(tokenizers["byte_level"], tmp_path / "tokenizer.json", change)
    tokenizer = Tokenizer(path)
    assert tokenizer.encoder == "tokenizers"
    with pytest.raises(DataPrepError, match=reason):
        Tokenizer(path, encoder="tiktoken")
    for text in TEXTS:
        assert int(tokenizer.encode_with_bytes(text)[1].sum()) == len(text.encode())


@pytest.mark.parametrize(
    ("kind", "options"),
    [("byte_level", {"dropout": 0.5}), ("unigram", {"alpha": 0.1, "nbest_size": 64})],
)
def test_options_of_random_encoding_are_ignored_with_a_warning(
    tokenizers: dict[str, Tokenizer], tmp_path: Path, kind: str, options: dict[str, float]
) -> None:
    path = changed(
        tokenizers[kind], tmp_path / "random.json", lambda content: content["model"].update(options)
    )
    with pytest.warns(
        InputWarning, match=f"random.json: {', '.join(options)} makes encoding random"
    ):
        tokenizer = Tokenizer(path, encoder="tokenizers")
    with pytest.warns(InputWarning):
        convert(str(path), tmp_path / "converted.json")
    tokenizer.copy_to(tmp_path / "copied.json")
    for text in TEXTS:
        for _ in range(5):
            assert np.array_equal(tokenizer.encode(text), tokenizers[kind].encode(text))
    for name in ("converted.json", "copied.json"):
        model = json.loads((tmp_path / name).read_text())["model"]
        assert not any(model.get(option) for option in options)


def test_special_tokens_have_the_names_of_the_file(
    tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    def normalize(content: dict[str, Any]) -> None:
        content["normalizer"] = {"type": "Prepend", "prepend": "_"}
        for token in content["added_tokens"]:
            token["normalized"] = True

    path = changed(tokenizers["byte_level"], tmp_path / "tokenizer.json", normalize)
    tokenizer = Tokenizer(path)
    assert tokenizer.token(tokenizer.end_id) == "<|endoftext|>"


def test_a_tokenizer_file_with_a_byte_order_mark_is_read(
    tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    path = tmp_path / "marked.json"
    path.write_bytes(b"\xef\xbb\xbf" + tokenizers["byte_level"].path.read_bytes())
    assert Tokenizer(path).encode("a b").tolist() == tokenizers["byte_level"].encode("a b").tolist()
    convert(str(path), tmp_path / "converted.json")
    assert (tmp_path / "converted.json").read_bytes()[:1] == b"{"


def test_a_token_that_no_merging_reaches_is_known_only_where_it_counts(
    tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    assert tokenizers["whole"].encode("a zqzq").tolist()[-1] == 420  # one token between two cuts
    path = changed(
        tokenizers["whole"],
        tmp_path / "tokenizer.json",
        lambda content: content["model"].update(ignore_merges=False),
    )
    without = Tokenizer(path)
    assert without.encoder == "tiktoken" and 420 not in without.encode("a zqzq").tolist()
    assert (
        without.encode("a zqzq").tolist()
        == plain(path).encode("a zqzq", add_special_tokens=False).ids
    )


LETTERS = ("a", "b", "c", "\u0120")


@st.composite
def listed_merges(draw: st.DrawFn) -> list[tuple[str, str]]:
    """Merges of random tokens in random order, unlike those of training.

    Some are never reached; some give the same token twice.
    """
    symbols, merges = list(LETTERS), []
    for _ in range(draw(st.integers(0, 14))):
        pair = (draw(st.sampled_from(symbols)), draw(st.sampled_from(symbols)))
        if pair not in merges and len("".join(pair)) < 9:
            merges.append(pair)
            symbols.append("".join(pair))
    return merges


@pytest.mark.thorough
@settings(max_examples=40, deadline=None)
@given(merges=listed_merges(), whole=st.booleans(), data=st.data())
def test_any_list_of_merges_is_encoded_as_by_the_library(
    tokenizers: dict[str, Tokenizer],
    merges: list[tuple[str, str]],
    whole: bool,
    data: st.DataObject,
) -> None:
    """Tiktoken is used where the order of the ids is that of the merges; the tokens are equal."""
    content = json.loads(tokenizers["byte_level"].path.read_text(encoding="utf-8"))
    vocabulary = {t: i for t, i in content["model"]["vocab"].items() if i <= 256}
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    content["model"] |= {
        "vocab": vocabulary,
        "merges": [list(pair) for pair in merges],
        "ignore_merges": whole,
    }
    path = tokenizers["byte_level"].path.with_name("merges.json")
    path.write_text(json.dumps(content), encoding="utf-8")
    tokenizer, library = Tokenizer(path), plain(path)
    if len({a + b for a, b in merges}) == len(merges) and not whole:
        assert tokenizer.encoder == "tiktoken"
    for text in data.draw(st.lists(st.text("abc ", max_size=40), min_size=20, max_size=40)):
        assert tokenizer.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids


@pytest.mark.thorough
def test_the_library_decomposes_nothing_that_python_does_not_know() -> None:
    """Text in normal form by Python is in normal form by the library."""
    unknown = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) == "Cn"]
    assert normalizers.NFD().normalize_str(" ".join(unknown)) == " ".join(unknown)


@pytest.mark.thorough
@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(
        st.sampled_from(
            [
                "==",
                "=",
                "===",
                " ",
                "a",
                "<|endoftext|>",
                "<|end",
                "=<",
                ">",
                "\n",
                "\u00e9",
                "e\u0301",
            ]
        ),
        max_size=12,
    )
)
def test_literal_tokens_are_cut_out_as_the_library_does(
    tokenizers: dict[str, Tokenizer], parts: list[str]
) -> None:
    path = tokenizers["byte_level"].path.with_name("literal.json")
    if "literal" not in tokenizers:
        changed(tokenizers["byte_level"], path, add_literal())
        content = json.loads(path.read_text())
        content["added_tokens"] += [
            content["added_tokens"][-1] | {"id": 421 + i, "content": name}
            for i, name in enumerate(("=<|end", ">="))
        ]
        path.write_text(json.dumps(content))
        tokenizers["literal"] = Tokenizer(path)
    tokenizer = tokenizers["literal"]
    text = "".join(parts)
    assert tokenizer.encoder == "tiktoken"
    assert tokenizer.encode(text).tolist() == plain(path).encode(text, add_special_tokens=False).ids
    check_bytes(tokenizer, text)


HUGE = {
    "spaces": " " * 10**6,
    "spaces, then a word": " " * 10**6 + "the",
    "letters": "a" * 10**6,
    "emojis": "\U0001f600" * 10**6,
    "newlines": "\n" * 10**6,
    "line ends": "\r\n" * (10**6 // 2),
    "all": " \n\r\n\t" * 10**5,
    "combining": "a" + "\u0301" * 10**5,
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", HUGE)
def test_runs_of_a_million(tokenizers: dict[str, Tokenizer], name: str) -> None:
    """Tiktoken's engine fails on some of these; the tokens equal the library's nevertheless."""
    text = HUGE[name]
    ids, sizes = tokenizers["byte_level"].encode_with_bytes(text)
    assert (
        ids.tolist()
        == plain(tokenizers["byte_level"].path).encode(text, add_special_tokens=False).ids
    )
    assert int(sizes.sum()) == len(text.encode())


@pytest.mark.thorough
def test_a_panic_of_the_engine_is_handled(
    tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts up to SHORT take a path on which the engine panics where the other raises."""
    monkeypatch.setattr(tiktoken_encoder, "SHORT", 2**30)
    text = HUGE["spaces, then a word"]
    assert tokenizers["byte_level"]._fast.encode(text) is None
    assert (
        tokenizers["byte_level"].encode(text).tolist()
        == plain(tokenizers["byte_level"].path).encode(text, add_special_tokens=False).ids
    )


@pytest.mark.parametrize("kind", ["neox", "llama", "unigram", "wordpiece"])
def test_runs_of_many_in_other_kinds(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    for text in (" " * 10**5, "a" * 10**5, "\U0001f600" * 10**4, "\r\n" * 10**4):
        assert int(tokenizers[kind].encode_with_bytes(text)[1].sum()) == len(text.encode())


def test_a_lone_surrogate_is_refused(tokenizers: dict[str, Tokenizer]) -> None:
    for kind in ANY_TEXT:
        for encode in (tokenizers[kind].encode, tokenizers[kind].encode_with_bytes):
            with pytest.raises(DataPrepError, match="refuses a text"):
                encode("a\ud800b")
