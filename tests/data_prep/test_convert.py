"""Converted tokenizers encode as their sources do in other libraries."""

from __future__ import annotations

import base64
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.tokenizer import Tokenizer, convert, train_bpe
from data_prep.tokenizer.adversarial import adversarial_texts
from data_prep.tokenizer.description import BYTE_OF, Description
from data_prep.tokenizer.patterns import PATTERNS, for_oniguruma
from data_prep.tokenizer.tiktoken_encoder import last_pair
from nextpt.base.errors import DataPrepError
from tests.support.tokenizers import KINDS, POSSESSIVE, TEXTS

ANY = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
FRAGMENTS = st.lists(st.sampled_from(adversarial_texts()[:120]) | ANY, max_size=6).map("".join)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[bytes, int]:
    """Ranks of a small encoding, with a token that no merging reaches."""
    path = tmp_path_factory.mktemp("ranks") / "trained.json"
    train_bpe(TEXTS, 420, path)
    trained = {
        bytes(BYTE_OF[c] for c in token): index - 1
        for token, index in Description.read(path).vocabulary.items()
        if index
    }
    return trained | {b" zqzq": 419}


def write_ranks(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    )
    return path


def check_equal(tokenizer: Tokenizer, encoding: tiktoken.Encoding, text: str) -> None:
    """Both encoders of nextpt give the tokens of tiktoken's own encoding."""
    expected = encoding.encode(text, disallowed_special=())
    assert tokenizer.encode(text).tolist() == expected and tokenizer.difference([text]) is None


@pytest.fixture(scope="module")
def opened() -> dict[str, tuple[Tokenizer, tiktoken.Encoding]]:
    return {}


@pytest.mark.thorough
@pytest.mark.parametrize("pattern", sorted(set(PATTERNS.values()) | set(POSSESSIVE.values())))
@settings(max_examples=60, deadline=None)
@given(text=FRAGMENTS)
def test_ranks_encode_as_tiktoken(
    ranks: dict[bytes, int],
    opened: dict,
    tmp_path_factory: pytest.TempPathFactory,
    pattern: str,
    text: str,
) -> None:
    if pattern not in opened:
        folder = tmp_path_factory.mktemp("converted")
        convert(
            str(write_ranks(folder / "own.tiktoken", ranks)),
            folder / "tokenizer.json",
            pattern=pattern,
        )
        opened[pattern] = (
            Tokenizer(folder / "tokenizer.json"),
            tiktoken.Encoding(
                "own", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 420}
            ),
        )
    tokenizer, encoding = opened[pattern]
    assert (tokenizer.encoder, tokenizer.byte_counts, tokenizer.end_id, tokenizer.vocab_size) == (
        "tiktoken",
        "table",
        420,
        421,
    )
    check_equal(tokenizer, encoding, text)


@pytest.mark.thorough
@pytest.mark.parametrize("pattern", sorted(set(PATTERNS.values()) | set(POSSESSIVE.values())))
def test_ranks_encode_difficult_texts_as_tiktoken(
    ranks: dict[bytes, int], tmp_path: Path, pattern: str
) -> None:
    convert(
        str(write_ranks(tmp_path / "own.tiktoken", ranks)),
        tmp_path / "tokenizer.json",
        pattern=pattern,
    )
    encoding = tiktoken.Encoding(
        "own", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 420}
    )
    for encoder in ("tiktoken", "tokenizers"):
        tokenizer = Tokenizer(tmp_path / "tokenizer.json", encoder=encoder)
        for text in [*adversarial_texts(), *TEXTS]:
            check_equal(tokenizer, encoding, text)


@pytest.mark.thorough
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_ranks_encode_as_tiktoken(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Random tokens in random order; unlike in trained ones, merging reaches few of them."""
    tokens = data.draw(
        st.lists(
            st.binary(min_size=2, max_size=6).map(lambda b: bytes(97 + c % 3 for c in b)),
            unique=True,
            max_size=25,
        )
    )
    ranks = {bytes([b]): b for b in range(256)} | {token: 256 + i for i, token in enumerate(tokens)}
    folder = tmp_path_factory.mktemp("any")
    convert(
        str(write_ranks(folder / "own.tiktoken", ranks)), folder / "tokenizer.json", pattern="gpt2"
    )
    tokenizer = Tokenizer(folder / "tokenizer.json")
    encoding = tiktoken.Encoding(
        "own", pat_str=PATTERNS["gpt2"], mergeable_ranks=ranks, special_tokens={}
    )
    assert tokenizer.encoder == "tiktoken"
    for text in [
        *(token.decode() for token in tokens),
        *data.draw(st.lists(st.text("abc", max_size=60), min_size=20, max_size=50)),
    ]:
        check_equal(tokenizer, encoding, text)


def test_the_pair_a_token_is_merged_from() -> None:
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"ab": 4, b"abc": 5, b"cab": 6, b"cc": 9}
    assert last_pair(b"abc", ranks) == (b"a", b"bc") and last_pair(b"cab", ranks) == (b"c", b"ab")
    assert (
        last_pair(b"ccb", ranks) == (b"cc", b"b")
        and last_pair(b"bacb", ranks) is None
        and last_pair(b"a", ranks) is None
    )


def test_patterns_for_the_other_engine() -> None:
    assert for_oniguruma(r"\p{N}{1,3}+| ?x++|\s++$|\$|[$]") == r"\p{N}{1,3}| ?x++|\s++\z|\$|[$]"


@pytest.mark.thorough
def test_special_tokens_of_ranks(ranks: dict[bytes, int], tmp_path: Path) -> None:
    source, output = write_ranks(tmp_path / "tokenizer.model", ranks), tmp_path / "tokenizer.json"
    convert(
        str(source),
        output,
        pattern="llama3",
        specials=["<|begin_of_text|>", "<|end_of_text|>=500", "<|pad|>"],
    )
    tokenizer = Tokenizer(output)
    assert (tokenizer.start_id, tokenizer.end_id, tokenizer.token(501), tokenizer.vocab_size) == (
        420,
        500,
        "<|pad|>",
        502,
    )
    convert(
        str(source),
        output,
        pattern="llama3",
        specials=["<|a|>", "<|b|>", "<|end_of_text|>"],
        start="<|a|>",
        end="<|b|>",
    )
    tokenizer = Tokenizer(output)  # the file itself says what surrounds a document
    assert (tokenizer.start_id, tokenizer.end_id) == (420, 421)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer.model"]


def tekken(ranks: dict[bytes, int], **more: object) -> dict[str, object]:
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, rank in ranks.items()
    ]
    config = {
        "pattern": PATTERNS["o200k_base"],
        "default_vocab_size": 440,
        "default_num_special_tokens": 30,
        "num_vocab_tokens": len(vocab),
    }
    return {"config": config, "vocab": vocab, "version": "v3"} | more


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["tekken.json", "tekken.json.xz"])
def test_tekken(ranks: dict[bytes, int], tmp_path: Path, name: str) -> None:
    data = json.dumps(tekken(ranks)).encode()
    (tmp_path / name).write_bytes(lzma.compress(data) if name.endswith("xz") else data)
    convert(str(tmp_path), tmp_path / "out.json")
    tokenizer = Tokenizer(tmp_path / "out.json")
    assert (
        tokenizer.vocab_size,
        tokenizer.token(tokenizer.start_id),
        tokenizer.token(tokenizer.end_id),
    ) == (440, "<s>", "</s>")
    assert [tokenizer.token(i) for i in (0, 3, 29)] == ["<unk>", "[INST]", "<SPECIAL_29>"]
    text_ranks = {token: rank + 30 for token, rank in ranks.items() if rank < 410}
    encoding = tiktoken.Encoding(
        "tekken", pat_str=PATTERNS["o200k_base"], mergeable_ranks=text_ranks, special_tokens={}
    )
    for text in [*adversarial_texts(), *TEXTS]:
        check_equal(tokenizer, encoding, text)


@pytest.mark.thorough
def test_tekken_with_a_list_of_its_own(ranks: dict[bytes, int], tmp_path: Path) -> None:
    special = [
        {"rank": i, "token_str": name, "is_control": True}
        for i, name in enumerate(["<unk>", "<s>", "</s>", "[NEW]"])
    ]
    (tmp_path / "tekken.json").write_text(json.dumps(tekken(ranks, special_tokens=special)))
    convert(str(tmp_path / "tekken.json"), tmp_path / "out.json")
    tokenizer = Tokenizer(tmp_path / "out.json")
    assert [tokenizer.token(i) for i in (3, 4)] == ["[NEW]", "<SPECIAL_4>"]


def write_pair(folder: Path, prefix: str = "") -> None:
    """encoder.json and vocab.bpe as OpenAI wrote them."""
    KINDS["gpt2"](folder / "trained.json")
    content = json.loads((folder / "trained.json").read_text(encoding="utf-8"))
    (folder / "trained.json").unlink()
    merges = [" ".join(pair) for pair in content["model"]["merges"]]
    ids = {
        chr_: i
        for i, chr_ in enumerate(
            sorted(BYTE_OF, key=lambda c: (not 33 <= BYTE_OF[c] < 127, BYTE_OF[c]))
        )
    }
    vocabulary = (
        ids
        | {merge.replace(" ", ""): 256 + i for i, merge in enumerate(merges)}
        | {"<|endoftext|>": 256 + len(merges)}
    )
    (folder / f"{prefix}encoder.json").write_text(json.dumps(vocabulary))
    (folder / f"{prefix}vocab.bpe").write_text(
        "#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8"
    )


@pytest.mark.thorough
@pytest.mark.parametrize("source", ["", "my_encoder.json", "my_vocab.bpe"])
def test_gpt2s_pair(tmp_path: Path, source: str) -> None:
    write_pair(tmp_path, "my_")
    convert(str(tmp_path / source), tmp_path / "out.json")
    tokenizer = Tokenizer(tmp_path / "out.json")
    content = json.loads((tmp_path / "my_encoder.json").read_text())
    ranks = {
        bytes(BYTE_OF[c] for c in token): rank
        for token, rank in content.items()
        if token != "<|endoftext|>"
    }
    encoding = tiktoken.Encoding(
        "pair", pat_str=PATTERNS["gpt2"], mergeable_ranks=ranks, special_tokens={}
    )
    assert tokenizer.token(tokenizer.end_id) == "<|endoftext|>"
    for text in [*adversarial_texts(), *TEXTS]:
        check_equal(tokenizer, encoding, text)


@pytest.mark.thorough
def test_tokenizer_json_passes_through(tmp_path: Path) -> None:
    KINDS["unigram"](tmp_path / "in.json")
    convert(str(tmp_path / "in.json"), tmp_path / "out.json", start="<pad>")
    before, after = Tokenizer(tmp_path / "in.json"), Tokenizer(tmp_path / "out.json")
    assert (after.start_id, after.end_id) == (0, before.end_id)
    assert all(
        before.encode(text).tolist() == after.encode(text).tolist() for text in adversarial_texts()
    )


def test_names_need_the_network_or_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: dict[bytes, int]
) -> None:
    """Tiktoken refuses a copy that differs from OpenAI's file, and cannot fetch another."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(
        DataPrepError, match=r"tiktoken cannot fetch the encoding p50k_base .*TIKTOKEN_CACHE_DIR"
    ):
        convert("p50k_base", tmp_path / "out.json")
    assert not list(tmp_path.iterdir())


def drop_byte(folder: Path, ranks: dict[bytes, int]) -> str:
    return str(
        write_ranks(
            folder / "in.tiktoken",
            {token: rank for token, rank in ranks.items() if token != b"\xff"},
        )
    )


def bad_line(folder: Path, ranks: dict[bytes, int]) -> str:
    path = write_ranks(folder / "in.tiktoken", ranks)
    path.write_bytes(path.read_bytes() + b"!!! 500\n")
    return str(path)


def same_rank(folder: Path, ranks: dict[bytes, int]) -> str:
    return str(write_ranks(folder / "in.tiktoken", ranks | {b"xyzzy": 3}))


def content(text: bytes, name: str = "in.json") -> Callable[[Path, dict[bytes, int]], str]:
    def write(folder: Path, ranks: dict[bytes, int]) -> str:
        (folder / name).write_bytes(text)
        return str(folder / name)

    return write


def lonely(folder: Path, ranks: dict[bytes, int]) -> str:
    write_pair(folder)
    (folder / "vocab.bpe").unlink()
    return str(folder / "encoder.json")


def broken_pair(folder: Path, ranks: dict[bytes, int]) -> str:
    write_pair(folder)
    with open(folder / "vocab.bpe", "a") as file:
        file.write("zq xx\n")
    return str(folder)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda folder, ranks: str(folder / "none"), {}, "does not exist; expected tokenizer.json"),
        (lambda folder, ranks: str(folder), {}, "holds no tokenizer"),
        (drop_byte, {"pattern": "gpt2"}, "no token for byte 0xff"),
        (bad_line, {"pattern": "gpt2"}, r"in.tiktoken:421: expected a token in base64"),
        (same_rank, {"pattern": "gpt2"}, "two tokens one id"),
        (
            lambda folder, ranks: str(write_ranks(folder / "in.tiktoken", ranks)),
            {},
            "give --pattern",
        ),
        (
            lambda folder, ranks: str(write_ranks(folder / "in.tiktoken", ranks)),
            {"pattern": "[a-z"},
            "cannot be read",
        ),
        (
            lambda folder, ranks: str(write_ranks(folder / "in.tiktoken", ranks)),
            {"pattern": "[a-z]+"},
            "leaves out text",
        ),
        (
            lambda folder, ranks: str(write_ranks(folder / "in.tiktoken", ranks)),
            {"pattern": "gpt2", "specials": ["x=3"]},
            "two tokens one id",
        ),
        (
            lambda folder, ranks: str(write_ranks(folder / "in.tiktoken", ranks)),
            {"pattern": "gpt2", "specials": ["th"]},
            "both a special token",
        ),
        (
            lambda folder, ranks: str(write_ranks(folder / "in.tiktoken", ranks)),
            {"pattern": "gpt2", "specials": ["<|x|>"]},
            "name the one that ends",
        ),
        (
            lambda folder, ranks: str(write_ranks(folder / "in.tiktoken", ranks)),
            {"pattern": "gpt2", "end": "<|x|>"},
            "not one of its special",
        ),
        (content(b"{"), {}, "is not JSON"),
        (content(b"{}"), {}, "no tokenizer that nextpt knows"),
        (content(b'{"vocab": [], "config": {}}'), {}, "not a tekken file"),
        (content(b'{"model": {}}'), {"pattern": "gpt2"}, "its own pattern"),
        (content(b"nonsense\n", "in.tiktoken"), {"pattern": "gpt2"}, "in.tiktoken:1"),
        (content(b"\n\x0e\xff", "tokenizer.model"), {}, "tokenizer.model:2"),
        (content(b"", "in.tiktoken"), {"pattern": "gpt2"}, "no token for byte 0x00"),
        (content(b"xx", "tekken.json.xz"), {}, "cannot be read"),
        (content(b'{"a": 1}'), {}, "name it encoder.json"),
        (lonely, {}, "needs vocab.bpe beside it"),
        (broken_pair, {}, r"vocab.bpe:\d+: expected two parts"),
    ],
)
def test_bad_sources_are_named(
    ranks: dict[bytes, int],
    tmp_path: Path,
    make: Callable[[Path, dict[bytes, int]], str],
    options: dict,
    message: str,
) -> None:
    source = make(tmp_path, ranks)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataPrepError, match=message) as raised:
        convert(source, tmp_path / "out.json", **options)
    assert "\n" not in str(raised.value) and sorted(tmp_path.iterdir()) == before


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    KINDS["llama"](tmp_path / "in.json")
    with pytest.raises(DataPrepError, match=r"nowhere/out.json cannot be written"):
        convert(str(tmp_path / "in.json"), tmp_path / "nowhere" / "out.json")
