"""Records of a part of a file (JSON lines, Parquet or plain text), read in bounded memory.

A bad record is yielded, not raised.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.inputs import InputFile
from data_prep.spec import LONGEST_DOCUMENT
from nextpt.base.errors import DataPrepError
from nextpt.base.stores import STORE_ERRORS, open_store, store_problem

BYTE_ORDER_MARK = codecs.BOM_UTF8  # skipped wherever a text or a line begins with it
BLOCK = 2**22
# A document and the other fields of its record; a worker holds a few copies of it at once and stays
# below 1 GiB. A text file is read whole, whatever its size.
LONGEST_LINE = 2**27
SHOWN_KEYS = 8  # of a record without a text, in the reason
# Part of a message of pyarrow's -> what to do about the file.
_DAMAGES = {
    "too much memory": (
        "was compressed with a long window; unpack it with `zstd -d --long=31`, or compress it"
        " without --long"
    ),
    "unknown compression method": (
        "has other bytes after its gzip stream, such as zeros; compress it again: `gzip -cd FILE |"
        " gzip`"
    ),
}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# Text compresses 3 to 10 times and repetitive logs some hundred; zeros 30,000 times (zstd). A bomb
# is a file that exceeds this ratio, once it has yielded more than BOMB_FLOOR bytes.
BOMB_RATIO = 1000
BOMB_FLOOR = 2**26
PARQUET_ROWS = 256
# Bytes of a compressed file from which its decompressed size is estimated, and the ratio assumed
# for files not much larger than that.
HEAD = 2**17
USUAL_EXPANSION = 4


@dataclass(frozen=True)
class Part:
    """A stretch of one file.

    Attributes:
        file: The file.
        start: For plain lines, bytes [start, stop) in which a line begins; for Parquet, row groups
            [start, stop); other files are whole, [0, size).
        stop: See start.
        stored: Bytes of the stored file that the part takes.
    """

    file: InputFile
    start: int
    stop: int
    stored: int


def whole(file: InputFile) -> Part:
    """The part that is all of a file."""
    return Part(
        file, 0, len(row_groups(file)) if file.format == ".parquet" else file.size, file.size
    )


@dataclass(frozen=True, slots=True)
class Record:
    """One document.

    position: byte offset of its line in the (decompressed) file, row of a Parquet file, 0 for a
    text file.
    """

    position: int
    text: str
    id: str | None
    domain: str | None


@dataclass(frozen=True, slots=True)
class Bad:
    """A record that cannot be used, and the reason."""

    position: int
    reason: str
    detail: str = ""
    id: str | None = None


def describe_bad(file: InputFile, bad: Bad) -> str:
    """File, position, reason and detail of a bad record, for a message."""
    return (
        f"{file.uri}, {'row' if file.format == '.parquet' else 'byte'} {bad.position}:"
        f" {bad.reason}{': ' * bool(bad.detail)}{bad.detail}"
    )


@dataclass(frozen=True)
class Fields:
    """Keys of a record.

    A dotted key ("meta.lang") descends into objects when there is no such key as a whole.
    """

    text: str = "text"
    id: str | None = "id"
    domain: str | None = None


def unreadable(error: Exception, what: str) -> DataPrepError:
    """The error for an input that a store does not give, or that is not what its name says."""
    return DataPrepError(str(store_problem(error, what)))


def read_part(
    part: Part, fields: Fields, advance: Callable[[int], None] = lambda n: None
) -> Iterator[Record | Bad]:
    """Yield the records of a part, good and bad, in order.

    Args:
        part: The part.
        fields: Keys of text, id and domain.
        advance: Called with the bytes of the stored file that were used up since the last call.

    Raises:
        DataPrepError: With the file, for what spoils all of it: a file that is gone, truncated, not
            in its format, or whose text column has another type; also when its store refuses.
    """
    kind = part.file.format
    partitions = _partitions(part.file)
    try:
        if kind == ".parquet":
            yield from _read_parquet(part, fields, partitions, advance)
        elif kind == ".txt":
            yield _read_text(part)
            advance(part.file.size)
        else:
            for position, line in _lines(part, advance):
                if isinstance(line, Bad):
                    yield line
                    continue
                line = line.removeprefix(BYTE_ORDER_MARK)  # files that were joined have several
                if position == 0:
                    _refuse_pointer(part.file, line)
                    _refuse_array(part.file, line)
                if line and not line.isspace():
                    yield _parse(position, line, fields, partitions)
    except STORE_ERRORS as error:
        for symptom, advice in _DAMAGES.items():
            if symptom in str(error):
                raise DataPrepError(f"{part.file.uri} {advice} ({error})") from error
        raise unreadable(error, f"{part.file.uri} cannot be read") from error


def _partitions(file: InputFile) -> dict[str, str]:
    """Values of the folders KEY=VALUE that a file is in, as Hive and Spark write partitions."""
    pairs = (segment.partition("=") for segment in file.uri.split("/")[:-1])
    return {unquote(key): unquote(value) for key, equals, value in pairs if equals}


def _refuse_pointer(file: InputFile, data: bytes) -> None:
    if data.startswith(LFS_POINTER):
        raise DataPrepError(f"{file.uri} is a Git LFS pointer, not the file; run `git lfs pull`")


def _refuse_array(file: InputFile, line: bytes) -> None:
    start = line.strip()
    if start == b"[" or re.match(rb"\[\s*\{", start):
        raise DataPrepError(
            f"{file.uri} is one JSON array, and one object a line is read; convert it: jq -c '.[]'"
        )
    if start == b"{":
        raise DataPrepError(
            f"{file.uri} is indented JSON, and one object a line is read; convert it: jq -c ."
        )


def _open(file: InputFile) -> tuple[pa.NativeFile, pa.NativeFile]:
    """Open a file: (stream of the decompressed bytes, the stored file below it).

    `tell` of the second says how much of the file is used up.
    """
    store, path = open_store(file.uri)
    raw = store.open_input_file(path)
    return (pa.CompressedInputStream(raw, file.compression) if file.compression else raw), raw


def unpacked_size(file: InputFile) -> int:
    """Size in bytes of a file once it is decompressed.

    For a large compressed file an estimate from its first bytes.
    """
    if not file.compression:
        return file.size
    if file.size <= 8 * HEAD:
        return file.size * USUAL_EXPANSION
    store, path = open_store(file.uri)
    unpacked = 0
    try:
        with store.open_input_file(path) as source:
            head = source.read(HEAD)
        with pa.CompressedInputStream(pa.BufferReader(head), file.compression) as stream:
            while unpacked < BOMB_RATIO * HEAD and (chunk := stream.read(2**16)):
                unpacked += len(chunk)
    # The head ends inside a compressed stream, which is an error here only; other damage is
    # reported when the whole file is read
    except STORE_ERRORS:
        pass
    return file.size * unpacked // HEAD or file.size * USUAL_EXPANSION


def _read_text(part: Part) -> Record | Bad:
    stream, _ = _open(part.file)
    blocks, size = [], 0
    with stream:
        while size <= LONGEST_DOCUMENT and (block := stream.read(BLOCK)):
            blocks.append(block)
            size += len(block)
            _refuse_bomb(part.file, size)
    data = b"".join(blocks)
    _refuse_pointer(part.file, data)
    if size > LONGEST_DOCUMENT:
        return Bad(0, "document too long", f"more than {LONGEST_DOCUMENT} bytes")
    text = _utf8(0, data.removeprefix(BYTE_ORDER_MARK))
    return text if isinstance(text, Bad) else Record(0, text, part.file.name, None)


def _lines(part: Part, advance: Callable[[int], None]) -> Iterator[tuple[int, bytes | Bad]]:
    """Yield (offset, line) of every line that begins in the part.

    A line above LONGEST_LINE is skipped in bounded memory.
    """
    file = part.file
    stream, raw = _open(file)
    with stream:
        offset = 0
        if part.start:
            stream.seek(part.start - 1)  # the byte before tells whether a line begins at `start`
            offset = part.start - 1
        used = part.start
        # The pieces of a line are joined once, at its end: joining them at every block would cost
        # quadratic time.
        pieces: list[bytes] = []
        length, skipping, first = 0, False, part.start > 0
        while chunk := stream.read(BLOCK):
            advance(min(raw.tell(), part.stop) - used)
            used = min(raw.tell(), part.stop)
            _refuse_bomb(file, offset + length + len(chunk))
            *ends, rest = chunk.split(b"\n")
            for end in ends:
                length += len(end)
                if not (skipping or first):
                    yield (
                        offset,
                        (b"".join([*pieces, end]) if length <= LONGEST_LINE else _too_long(offset)),
                    )
                pieces, skipping, first = [], False, False
                offset, length = offset + length + 1, 0
                if offset >= part.stop and not file.compression:
                    return
            length += len(rest)
            if length > LONGEST_LINE and not skipping:
                if not first:
                    yield offset, _too_long(offset)
                pieces, skipping = [], True
            if not (skipping or first):
                pieces.append(rest)
        if length and not (skipping or first):
            yield offset, b"".join(pieces)


def _too_long(offset: int) -> Bad:
    return Bad(offset, "line too long", f"more than {LONGEST_LINE} bytes without a newline")


def _refuse_bomb(file: InputFile, unpacked: int) -> None:
    if file.compression and unpacked > BOMB_FLOOR and unpacked > BOMB_RATIO * file.size:
        raise DataPrepError(
            f"{file.uri}: its {file.size} bytes unpack to more than {BOMB_RATIO} times as many, as"
            " those of a decompression bomb do; unpack it yourself if it is to be trusted"
        )


def _parse(position: int, line: bytes, fields: Fields, partitions: dict[str, str]) -> Record | Bad:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        checked = _utf8(position, line)
        if isinstance(checked, Bad):
            return checked
        try:
            record = _parse_as_python(checked)
        except (ValueError, RecursionError):
            return Bad(position, "not a JSON object", str(error))
    if not isinstance(record, dict):
        return Bad(position, "not a JSON object", f"it is a {type(record).__name__}")
    if fields.id and isinstance(_lookup(record, fields.id), float):
        # As it is written: a whole number above 64 bits was read as the nearest float.
        exact = json.loads(line, parse_float=str, parse_int=str)
        return _record(position, record, fields, partitions, _lookup(exact, fields.id))
    return _record(position, record, fields, partitions)


def _parse_as_python(text: str) -> Any:
    """Parse JSON with NaN and Infinity, as Python's json writes them.

    Raises:
        ValueError: It is no JSON for another reason.
    """
    if "NaN" not in text and "Infinity" not in text:
        raise ValueError(text[:40])
    return json.loads(text)


def _record(
    position: int,
    record: dict[str, Any],
    fields: Fields,
    partitions: dict[str, str],
    written_id: str | None = None,
) -> Record | Bad:
    """Pick the configured keys out of a record."""
    name = written_id or (_lookup(record, fields.id) if fields.id else None)
    name = None if name is None or name == "" else str(name)
    text = _lookup(record, fields.text)
    if text is None:
        known = fields.text in record
        keys = ", ".join(map(repr, list(record)[:SHOWN_KEYS]))
        return Bad(
            position,
            "null text" if known else "no text",
            f"expected a string under key {fields.text!r}"
            + ("" if known else f"; its keys are {keys or 'none'}"),
            name,
        )
    if not isinstance(text, str):
        return Bad(
            position,
            "text is no string",
            f"key {fields.text!r} holds a {type(text).__name__}",
            name,
        )
    if name is None and fields.id not in (None, Fields.id):
        return Bad(position, "no id", f"expected an id under key {fields.id!r}")
    domain = None
    if fields.domain:
        domain = _lookup(record, fields.domain)
        domain = partitions.get(fields.domain) if domain is None else domain
        if not isinstance(domain, str):
            return Bad(
                position, "no domain", f"expected a string under key {fields.domain!r}", name
            )
    return Record(position, text, name, domain)


def _lookup(record: dict[str, Any], key: str) -> Any:
    if key in record or "." not in key:
        return record.get(key)
    value: Any = record
    for step in key.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    return value


def _utf8(position: int, data: bytes) -> str | Bad:
    try:
        return codecs.decode(data, "utf-8")
    except UnicodeDecodeError as error:
        return Bad(position, "not UTF-8", f"byte {error.start} of it")


def row_groups(file: InputFile) -> list[int]:
    """Uncompressed bytes of each row group of a Parquet file.

    Raises:
        DataPrepError: When the file is not Parquet.
    """
    store, path = open_store(file.uri)
    try:
        with store.open_input_file(path) as source:
            metadata = pq.ParquetFile(source).metadata
            return [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    except STORE_ERRORS as error:
        raise unreadable(error, f"{file.uri} cannot be read as Parquet") from error


def _read_parquet(
    part: Part, fields: Fields, partitions: dict[str, str], advance: Callable[[int], None]
) -> Iterator[Record | Bad]:
    store, path = open_store(part.file.uri)
    with store.open_input_file(path) as source:
        table = pq.ParquetFile(source)
        groups = range(part.start, min(part.stop, table.num_row_groups))
        columns = _columns(part.file, table.schema_arrow, fields, partitions)
        row = sum(table.metadata.row_group(i).num_rows for i in range(part.start))
        total = max(sum(table.metadata.row_group(i).num_rows for i in groups), 1)
        for batch in table.iter_batches(
            batch_size=PARQUET_ROWS, row_groups=list(groups), columns=columns
        ):
            for record in _rows(batch):
                if isinstance(record, Exception):
                    yield Bad(row, "not UTF-8", str(record))
                else:
                    yield _record(row, record, fields, partitions)
                row += 1
            advance(part.stored * batch.num_rows // total)


def _columns(
    file: InputFile, schema: pa.Schema, fields: Fields, partitions: dict[str, str]
) -> list[str]:
    """Columns to read, by the first step of each key.

    Raises:
        DataPrepError: When a column is missing or occurs twice, or the text is not a string.
    """
    columns = []
    for key in (fields.text, fields.id, fields.domain):
        if key is None:
            continue
        name = key if key in schema.names else key.split(".")[0]
        if schema.names.count(name) > 1:
            raise DataPrepError(f"{file.uri}: several columns are named {name!r}; rename them")
        if name in schema.names:
            columns.append(name)
        elif key != Fields.id and not (key == fields.domain and key in partitions):
            raise DataPrepError(f"{file.uri}: no column {key!r}; it has {', '.join(schema.names)}")
    if fields.text in schema.names:
        kind = schema.field(fields.text).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (
            pa.types.is_string(kind)
            or pa.types.is_large_string(kind)
            or pa.types.is_string_view(kind)
            or pa.types.is_null(kind)
        ):
            raise DataPrepError(
                f"{file.uri}: column {fields.text!r} is of type {kind}, expected string"
            )
    return list(dict.fromkeys(columns))


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Exception]:
    """Yield rows as dicts.

    A row whose bytes are not UTF-8 is yielded as its error, and spoils no other.
    """
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass
    for i in range(batch.num_rows):
        try:
            yield batch.slice(i, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield error
