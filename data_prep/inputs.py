"""Input files of a corpus: a file, a folder, a glob, local or in an object store."""

from __future__ import annotations

import fnmatch
import posixpath
import re
from dataclasses import dataclass
from pathlib import Path

import xxhash
from pyarrow import fs

from nextpt.base.errors import DataPrepError
from nextpt.base.stores import STORE_ERRORS, is_uri, open_store, store_problem

FORMATS = (".jsonl", ".ndjson", ".json", ".txt", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SMALL = 2**20  # bytes up to which a local file is identified by its content
READABLE = ".jsonl, .ndjson, .json (one object a line) or .txt, plain, .gz or .zst; .parquet"


@dataclass(frozen=True)
class InputFile:
    """One input file.

    Attributes:
        uri: Path or URI.
        name: Path below the location that it was found in.
        size: Bytes as stored.
        stamp: Changes when the file does: the modification time in ns as far as the store has one;
            for small local files a hash of the content, so that a copy counts as the same file.
    """

    uri: str
    name: str
    size: int
    stamp: int

    @property
    def format(self) -> str:
        """One of FORMATS."""
        return format_of(self.name) or ""

    @property
    def compression(self) -> str | None:
        """Compression of the file: "gzip", "zstd" or None."""
        return COMPRESSIONS.get(posixpath.splitext(self.name)[1].lower())


def format_of(name: str) -> str | None:
    """Format that a file's name tells; None for a file that is not read."""
    stem, end = posixpath.splitext(name.lower())
    if end in COMPRESSIONS:
        end = posixpath.splitext(stem)[1]
        return end if end in FORMATS and end != ".parquet" else None
    return end if end in FORMATS else None


def find_files(location: str | Path) -> list[InputFile]:
    """List the readable files of a location, sorted by name.

    Files whose name begins with "." or "_" are markers of other programs; in folders they are
    skipped.

    Raises:
        DataPrepError: With the location, when it does not exist or holds no readable file.
        StoreError: When the store refuses.
    """
    text = str(location)
    pattern = re.search(r"[*?\[]", text)
    base = text[: pattern.start()].rpartition("/")[0] if pattern else text
    if pattern and text.startswith("/") and not base:
        base = "/"
    store, path = open_store(base or ".")
    try:
        info = store.get_file_info(path)
        if info.type == fs.FileType.File:
            if format_of(path) is None:
                raise DataPrepError(f"{text}: expected {READABLE}")
            return [_input(text, posixpath.basename(path), info)]
        if info.type == fs.FileType.NotFound:
            raise DataPrepError(f"corpus {text} does not exist")
        listing = store.get_file_info(fs.FileSelector(path, recursive=True))
    except STORE_ERRORS as error:
        raise store_problem(error, text) from error
    return _readable(text, base, path, listing, pattern is not None)


def _readable(
    text: str, base: str, path: str, listing: list[fs.FileInfo], pattern: bool
) -> list[InputFile]:
    """The files in a listing of folder `path` that match and have a format that is read."""
    files = []
    for entry in listing:
        name = posixpath.relpath(entry.path, path)
        uri = f"{base.rstrip('/')}/{name}" if base else name
        matches = (
            _matches(uri, text)
            if pattern
            else not any(part.startswith((".", "_")) for part in name.split("/"))
        )
        if entry.type == fs.FileType.File and matches and format_of(name):
            files.append(_input(uri, name, entry))
    if not files:
        raise DataPrepError(
            f"no file matches {text}, of those that are read: {READABLE}"
            if pattern
            else f"folder {text} holds no file that is read: {READABLE}"
        )
    return sorted(files, key=lambda f: f.name)


def _input(uri: str, name: str, info: fs.FileInfo) -> InputFile:
    if info.size <= SMALL and not is_uri(uri):
        return InputFile(uri, name, info.size, xxhash.xxh64_intdigest(Path(info.path).read_bytes()))
    return InputFile(uri, name, info.size, info.mtime_ns if info.mtime is not None else 0)


def _matches(uri: str, pattern: str) -> bool:
    """Match a glob by path segments: `*` stays within one, `**` spans any number."""
    return re.fullmatch(_glob_expression(pattern), uri) is not None


def _glob_expression(pattern: str) -> str:
    parts = []
    for segment in pattern.split("/"):
        if segment == "**":
            parts.append("(?:[^/]+/)*")
        else:
            expression = fnmatch.translate(segment)  # (?s:...)\Z
            parts.append(
                expression.removeprefix("(?s:").removesuffix(r")\Z").replace(".*", "[^/]*") + "/"
            )
    return "".join(parts).removesuffix("/")
