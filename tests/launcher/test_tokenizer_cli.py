"""`nextpt tokenizer`: train, convert and show."""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from data_prep.tokenizer import Tokenizer
from launcher.cli import app
from nextpt.base.errors import DeprecatedNameWarning
from tests.support.tokenizers import KINDS, TEXTS


def nextpt(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["tokenizer", *map(str, arguments)])


def write_corpus(folder: Path) -> Path:
    lines = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS * 3)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress((lines + '{"body": \n').encode()))
    (folder / "b.txt").write_text("other words of another file\n" * 5)
    return folder


@pytest.mark.thorough
def test_train(tmp_path: Path) -> None:
    corpus, output = write_corpus(tmp_path), tmp_path / "out.json"
    result = nextpt(
        "train",
        f"code={corpus / 'a.jsonl.gz'}",
        corpus / "b.txt",
        "--vocab-size",
        400,
        "--output",
        output,
        "--text-field",
        "body",
    )
    assert result.exit_code == 0, result.output
    size = sum(len(text.encode()) for text in TEXTS * 3) + 28 * 5
    for line in (
        f"training 400 tokens on {size:,} bytes",
        "1 bad records skipped",
        "bytes per token",
        "encoder          tiktoken",
        "difference       none",
    ):
        assert line in result.output, result.output
    tokenizer = Tokenizer(output)
    assert tokenizer.vocab_size == 400 and len(tokenizer.encode("another")) < 4
    # No text is left to train on
    assert (
        nextpt(
            "train", corpus / "b.txt", "--vocab-size", 400, "--output", output, "--max-bytes", 10
        ).exit_code
        == 2
    )


@pytest.mark.thorough
def test_convert_and_show(tmp_path: Path) -> None:
    ranks = tmp_path / "own.tiktoken"
    ranks.write_bytes(b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256)))
    result = nextpt(
        "convert",
        ranks,
        "--output",
        tmp_path / "tokenizer.json",
        "--pattern",
        "gpt2",
        "--special",
        "<|a|>",
        "--special",
        "<|z|>=300",
        "--start-token",
        "<|a|>",
        "--end-token",
        "<|z|>",
    )
    assert (
        result.exit_code == 0
        and "start            <|a|> (256)" in result.output
        and "end              <|z|> (300)" in result.output
    ), result.output
    (tmp_path / "text.txt").write_text("h\u00e9!")
    description = json.loads(
        nextpt("show", tmp_path, "--text", tmp_path / "text.txt", "--json").output
    )
    assert {
        k: description[k]
        for k in (
            "kind",
            "vocab_size",
            "byte_counts",
            "text_bytes",
            "text_tokens",
            "bytes_per_token",
        )
    } == {
        "kind": "byte-level BPE",
        "vocab_size": 301,
        "byte_counts": "table",
        "text_bytes": 4,
        "text_tokens": 4,
        "bytes_per_token": 1.0,
    }


def test_show_names_the_reason_for_the_encoder(tmp_path: Path) -> None:
    KINDS["wordpiece"](tmp_path / "bert.json")
    with pytest.warns(DeprecatedNameWarning, match="--end is now --end-token"):
        result = nextpt("show", tmp_path / "bert.json", "--end", "[MASK]")
    for line in (
        "kind             WordPiece",
        "start            [CLS] (2)",
        "end              [MASK] (4)",
        "encoder          tokenizers",
        "encoder reason   it is WordPiece",
        "byte counts      column",
    ):
        assert line in result.output
    assert "text tokens" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "none.json"], "tokenizer none.json does not exist"),
        (["convert", "none", "--output", "x.json"], "none does not exist; expected tokenizer.json"),
        (["train", "none.jsonl", "--output", "x.json"], "corpus none.jsonl does not exist"),
        (["train", "code=none.jsonl", "--output", "x.json"], "corpus none.jsonl does not exist"),
        (
            ["train", "none.jsonl", "--output", "nowhere/x.json"],
            "nowhere for the tokenizer does not exist",
        ),
    ],
)
def test_user_errors_end_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = nextpt(*arguments)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and message in result.stderr, (
        result.output
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train", "convert", "show"])
def test_help_has_an_example(command: str) -> None:
    result = nextpt(command, "--help")
    assert result.exit_code == 0 and "example: nextpt tokenizer" in result.output
