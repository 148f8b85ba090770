"""Reading documents: JSON lines (plain, .gz, .zst), Parquet, plain text, and folders of these."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.errors import PrepError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")


@dataclass(frozen=True)
class Document:
    """One text of one domain; `id` tells where it comes from."""

    id: str
    text: str


def files_of(path: Path) -> list[Path]:
    """The readable files of a file or folder, in a fixed order. Raises PrepError when there is none."""
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise PrepError(f"{path}: expected one of {', '.join(SUFFIXES)}")
        return [path]
    if not path.is_dir():
        raise PrepError(f"corpus {path} does not exist")
    found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
    if not found:
        raise PrepError(f"folder {path} holds no {', '.join(SUFFIXES)} file")
    return found


def read_documents(path: Path, text_field: str = "text", id_field: str = "id") -> Iterator[Document]:
    """Documents of a file or folder. Raises PrepError that names the file and line of a bad record."""
    for file in files_of(path):
        if file.suffix == ".parquet":
            yield from _read_parquet(file, text_field, id_field)
        elif file.suffix == ".txt":
            yield Document(str(file), _utf8(file.read_bytes(), str(file)))
        else:
            yield from _read_json_lines(file, text_field, id_field)


def _read_json_lines(file: Path, text_field: str, id_field: str) -> Iterator[Document]:
    number = 0
    try:
        with pa.input_stream(str(file), compression="detect") as stream:
            for number, line in enumerate(_lines(stream), 1):
                if line.strip():
                    yield _record(line, f"{file}:{number}", text_field, id_field)
    except (OSError, pa.ArrowException) as error:
        raise PrepError(f"{file} cannot be read past line {number}: {error}") from error


def _lines(stream: pa.NativeFile, block: int = 2**20) -> Iterator[bytes]:
    rest = b""
    while chunk := stream.read(block):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    if rest:
        yield rest


def _record(line: bytes, place: str, text_field: str, id_field: str) -> Document:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        _utf8(line, place)
        raise PrepError(f"{place}: not a JSON object: {error}") from error
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise PrepError(f"{place}: expected a string under key {text_field!r}")
    return Document(str(record.get(id_field, place)), text)


def _read_parquet(file: Path, text_field: str, id_field: str) -> Iterator[Document]:
    try:
        table = pq.ParquetFile(file)
        names = table.schema_arrow.names
        if text_field not in names:
            raise PrepError(f"{file}: no column {text_field!r}; it has {', '.join(names)}")
        wanted = [text_field] + [id_field] * (id_field in names)
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=wanted):
            for record in batch.to_pylist():
                row += 1
                if not isinstance(record[text_field], str):
                    raise PrepError(f"{file}: row {row}: expected a string in column {text_field!r}")
                yield Document(str(record.get(id_field, f"{file}:{row}")), record[text_field])
    except (OSError, pa.ArrowException) as error:
        raise PrepError(f"{file} cannot be read as Parquet: {error}") from error


def _utf8(data: bytes, place: str) -> str:
    try:
        return codecs.decode(data, "utf-8")
    except UnicodeDecodeError as error:
        raise PrepError(f"{place}: byte {error.start} is not UTF-8; convert the file or remove the document") from error
