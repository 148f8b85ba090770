"""`nextpt tokenizer`: train, convert and describe tokenizers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.console import console, echo
from launcher.options import EndToken, PrintJson, StartToken, TextField
from launcher.registration import add_command, add_group
from nextpt.base.errors import DataPrepError, UserError

if TYPE_CHECKING:
    from data_prep.tokenizer import Tokenizer

Output = Annotated[Path, typer.Option(help="tokenizer.json to write")]
OLD_FLAGS = {"--start": "--start-token", "--end": "--end-token"}


def tokenizer_train(
    corpora: Annotated[
        list[str],
        typer.Argument(
            metavar="[DOMAIN=]PATH...",
            help="files, folders, globs or URIs: .jsonl, .txt [.gz|.zst], .parquet",
        ),
    ],
    output: Output,
    vocab_size: Annotated[
        int, typer.Option(help="tokens, including the special token at the end of a document")
    ] = 32768,
    max_bytes: Annotated[
        float,
        typer.Option(
            min=1,
            help="maximum bytes of training text, an even sample of the corpus, held in memory",
        ),
    ] = 1e9,
    text_field: TextField = "text",
) -> None:
    """Train a byte-level BPE tokenizer on a corpus."""
    from data_prep.tokenizer import Tokenizer, evenly_sampled, train_bpe

    if not output.absolute().parent.is_dir():
        raise DataPrepError(f"folder {output.absolute().parent} for the tokenizer does not exist")
    sample = evenly_sampled(
        _read_texts([_path_of(item) for item in corpora], text_field), int(max_bytes)
    )
    size = sum(len(text.encode()) for text in sample)
    echo(f"training {vocab_size:,} tokens on {size:,} bytes")
    train_bpe(sample, vocab_size, output, total=len(sample), progress=console.is_terminal)
    _print_description(_describe(Tokenizer(output), sample))


def _path_of(item: str) -> str:
    """Return PATH of an argument PATH or DOMAIN=PATH, as `nextpt prep shards` takes them."""
    from data_prep.spec import DOMAIN_NAME

    name, equals, path = item.partition("=")
    return path if equals and DOMAIN_NAME.fullmatch(name) and not Path(item).exists() else item


def _read_texts(paths: list[str], text_field: str) -> Iterator[str]:
    """Yield the texts of the corpora with a progress bar; bad records are skipped and counted."""
    from data_prep.inputs import find_inputs
    from data_prep.progress import byte_progress
    from data_prep.records import Bad, Fields, describe_bad, read_part, whole

    files = [
        file for files in find_inputs({path: path for path in paths}).values() for file in files
    ]
    bad = good = 0
    first = ""
    with byte_progress(console) as progress:
        task = progress.add_task("reading", total=sum(file.size for file in files))
        for file in files:
            for record in read_part(
                whole(file), Fields(text_field, None), partial(progress.advance, task)
            ):
                if isinstance(record, Bad):
                    bad += 1
                    first = first or describe_bad(file, record)
                else:
                    good += 1
                    yield record.text
    if bad and not good:
        raise UserError(f"all {bad:,} records are bad; the first: {first}")
    if bad:
        echo(f"{bad:,} bad records skipped, the first: {first}; nextpt prep shards lists them")


def tokenizer_convert(
    source: Annotated[
        str,
        typer.Argument(
            help=(
                "tokenizer.json, a tiktoken rank file (.tiktoken), encoder.json with vocab.bpe,"
                " tekken.json, or a name such as cl100k_base"
            )
        ),
    ],
    output: Output,
    pattern: Annotated[
        str | None,
        typer.Option(
            help=(
                "pre-tokenization of a rank file: gpt2, cl100k_base, llama3, o200k_base, qwen, or"
                " a regular expression"
            )
        ),
    ] = None,
    special: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOKEN[=ID]",
            help="special token of a rank file, in the order of the ids; may be repeated",
        ),
    ] = None,
    start_token: StartToken = None,
    end_token: EndToken = None,
) -> None:
    """Convert a tokenizer to tokenizer.json and compare both on adversarial texts."""
    from data_prep.tokenizer import Tokenizer, convert

    convert(
        source,
        output,
        pattern=pattern,
        specials=special or (),
        start=start_token,
        end=end_token,
    )
    _print_description(_describe(Tokenizer(output), []))


def tokenizer_show(
    file: Annotated[Path, typer.Argument(help="tokenizer.json, or a folder that holds one")],
    text: Annotated[
        str | None, typer.Option(help="corpus to encode; both libraries are compared on it")
    ] = None,
    text_field: TextField = "text",
    start_token: StartToken = None,
    end_token: EndToken = None,
    as_json: PrintJson = False,
) -> None:
    """Describe a tokenizer: kind, size, the library that encodes with it, bytes per token."""
    from data_prep.documents import read_documents
    from data_prep.tokenizer import Tokenizer

    path = file / "tokenizer.json" if file.is_dir() else file
    tokenizer = Tokenizer(path, start=start_token, end=end_token)
    description = _describe(
        tokenizer, (d.text for d in read_documents(text, text_field)) if text else ()
    )
    if as_json:
        print(json.dumps(description, indent=1))
    else:
        _print_description(description)


def _describe(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, Any]:
    """Describe a tokenizer.

    Args:
        tokenizer: The tokenizer.
        texts: Texts to encode for bytes per token and the comparison of both libraries; none where
            these are not needed.
    """
    description: dict[str, Any] = {
        "file": str(tokenizer.path),
        "sha256": tokenizer.sha256,
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "start": f"{tokenizer.token(tokenizer.start_id)} ({tokenizer.start_id})",
        "end": f"{tokenizer.token(tokenizer.end_id)} ({tokenizer.end_id})",
        "encoder": tokenizer.encoder,
        "encoder_reason": tokenizer.encoder_reason,
        "byte_counts": tokenizer.byte_counts,
    }
    size = tokens = 0
    difference = None
    for text in texts:
        size, tokens = size + len(text.encode()), tokens + len(tokenizer.encode(text))
        difference = difference or tokenizer.difference([text])
    if tokens:
        description |= {
            "text_bytes": size,
            "text_tokens": tokens,
            "bytes_per_token": round(size / tokens, 3),
        }
        if tokenizer.encoder == "tiktoken":
            description["difference"] = (
                difference or "none: both libraries give the same tokens on this text"
            )
    return description


def _print_description(description: dict[str, Any]) -> None:
    for name, value in description.items():
        text = f"{value:,}" if isinstance(value, int) else str(value)
        echo(f"{name.replace('_', ' '):<16} {text}")


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = add_group(app, "tokenizer", help="Train, convert and describe tokenizers.")
    add_command(
        group,
        "train",
        tokenizer_train,
        example=(
            "nextpt tokenizer train code=data/code.jsonl data/prose --vocab-size 32768"
            " --output tokenizer.json"
        ),
    )
    add_command(
        group,
        "convert",
        tokenizer_convert,
        example="nextpt tokenizer convert tekken.json --output tokenizer.json",
        deprecated=OLD_FLAGS,
    )
    add_command(
        group,
        "show",
        tokenizer_show,
        example="nextpt tokenizer show tokenizer.json --text data/prose.jsonl",
        deprecated=OLD_FLAGS,
    )
