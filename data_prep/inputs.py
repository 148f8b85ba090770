"""Input files of a corpus: a file, a folder, a glob, local or in an object store."""

from __future__ import annotations

import fnmatch
import os
import posixpath
import re
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash
from pyarrow import fs

from nextpt.base.errors import DataPrepError, InputWarning
from nextpt.base.files import expand_home
from nextpt.base.stores import STORE_ERRORS, is_uri, open_store, store_problem

_PATTERN = re.compile(r"[*?\[]")
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


def find_inputs(locations: Mapping[str, str | Path]) -> dict[str, list[InputFile]]:
    """List the files of several locations, as `find_files` does, each file once.

    A file that two locations reach is read for the one that holds it, not a link to it.

    Args:
        locations: Name of a domain -> location.

    Raises:
        DataPrepError: As `find_files`, or a location holds no file of its own.
    """
    files = {name: find_files(location) for name, location in locations.items()}
    entries = [(name, file, _local_path(file.uri)) for name in files for file in files[name]]
    entries.sort(key=lambda entry: entry[2] != os.path.realpath(entry[2]))  # stable: links last
    owners: dict[tuple[int, int], tuple[str, InputFile]] = {}
    kept: dict[str, set[str]] = {name: set() for name in files}
    shared: dict[tuple[str, str], list[str]] = {}
    for name, file, path in entries:
        owner, first = owners.setdefault(_inode(path), (name, file)) if path else (name, file)
        if (owner, first.uri) == (name, file.uri):
            kept[name].add(file.uri)
        else:
            shared.setdefault((name, owner), []).append(file.uri)
    for (name, owner), uris in shared.items():
        _warn(
            f"{len(uris)} files of {name} are files of {owner} too, such as {uris[0]}; each is read"
            f" once, for {owner}"
        )
    for name in files:
        if not kept[name]:
            raise DataPrepError(
                f"{locations[name]} ({name}) holds only files of the other inputs; leave it out"
            )
    return {name: [file for file in files[name] if file.uri in kept[name]] for name in files}


def find_files(location: str | Path) -> list[InputFile]:
    """List the readable files of a location, sorted by name.

    Links are followed, and a file that has several names is listed once. Files whose name begins
    with "." or "_" are markers of other programs; in folders they are skipped. A location that
    exists is no pattern, whatever characters it has.

    Raises:
        DataPrepError: With the location, when it does not exist or holds no readable file; with
            the name of a link to nothing.
        StoreError: When the store refuses.
    """
    text = str(location) if is_uri(location) else expand_home(str(location))
    try:
        base, pattern = _split(text)
        store, path = open_store(base or ".")
        info = store.get_file_info(path)
        if info.type == fs.FileType.File and not pattern:
            if format_of(path) is None:
                raise DataPrepError(f"{text}: expected {READABLE}")
            return [_input(text, posixpath.basename(path), info)]
        if info.type == fs.FileType.NotFound:
            if os.path.islink(path) and isinstance(store, fs.LocalFileSystem):
                raise _broken(path)
            raise DataPrepError(f"corpus {text} does not exist")
        if info.type == fs.FileType.Unknown:
            raise _no_file(text)

        def wants(name: str) -> bool:
            """Whether a file or a link of that name is asked for."""
            if pattern:
                return _matches(name, pattern)
            return not any(part.startswith((".", "_")) for part in name.split("/"))

        if isinstance(store, fs.LocalFileSystem):
            names = _list_folder(path, wants, every_path=bool(pattern))
            listing = store.get_file_info([f"{path}/{name}" for name in names])
        else:
            listing = store.get_file_info(fs.FileSelector(path, recursive=True))
    except STORE_ERRORS as error:
        raise store_problem(error, text) from error
    files = []
    for entry in listing:
        name = posixpath.relpath(entry.path, path)
        if entry.type == fs.FileType.File and format_of(name) and wants(name):
            files.append(_input(f"{base.rstrip('/')}/{name}" if base else name, name, entry))
    if not files:
        raise DataPrepError(
            f"no file matches {text}, of those that are read: {READABLE}"
            if pattern
            else f"folder {text} holds no file that is read: {READABLE}"
        )
    return sorted(files, key=lambda f: f.name)


def _split(text: str) -> tuple[str, str]:
    """(beginning that is no pattern, pattern below it); names that exist are no patterns."""
    segments = text.split("/")
    for number, segment in enumerate(segments):
        if _PATTERN.search(segment) and not _exists("/".join(segments[: number + 1])):
            root = "/" if text.startswith("/") else ""
            return "/".join(segments[:number]) or root, "/".join(segments[number:])
    return text, ""


def _exists(location: str) -> bool:
    store, path = open_store(location)
    return bool(store.get_file_info(path).type != fs.FileType.NotFound)


def _list_folder(folder: str, wants: Callable[[str], bool], *, every_path: bool) -> list[str]:
    """Names below a local folder of the readable files that are asked for, each file once.

    Args:
        folder: The folder.
        wants: Whether the file or link of a name is asked for.
        every_path: Go every way that is no circle, since only some may be asked for; otherwise a
            folder is entered once, and only if it is asked for.
    """
    files: dict[tuple[int, int], str] = {}
    entered: set[tuple[int, int]] = set()
    links, repeated = [], []
    # (name, folders above it, whether a link led to it). What no link leads to comes first: those
    # names are the files' own.
    folders: deque[tuple[str, frozenset[tuple[int, int]], bool]] = deque([("", frozenset(), False)])
    while folders:
        below, above, linked = folders.popleft()
        inode = _inode(f"{folder}/{below}")
        if inode in above or (inode in entered and not every_path):
            repeated.append(below)
            continue
        entered.add(inode)
        for entry in sorted(os.scandir(f"{folder}/{below}"), key=lambda entry: entry.name):
            name = f"{below}/{entry.name}" if below else entry.name
            by_link = linked or entry.is_symlink()
            if not os.path.exists(entry.path):
                if wants(name):
                    raise _broken(entry.path)
            elif entry.is_dir():
                if every_path or wants(name):
                    add = folders.append if by_link else folders.appendleft
                    add((name, above | {inode}, by_link))
            elif format_of(name) and wants(name):
                if not os.path.isfile(entry.path):
                    raise _no_file(entry.path)
                if by_link:
                    links.append(name)
                elif files.setdefault(_inode(entry.path), name) != name:
                    repeated.append(name)
    for name in links:
        if files.setdefault(_inode(f"{folder}/{name}"), name) != name:
            repeated.append(name)
    if repeated:
        _warn(
            f"{folder}: {len(repeated)} links and second names lead to what is read anyway"
            f" ({', '.join(repeated[:3])}{', ...' * (len(repeated) > 3)}); each file is read once"
        )
    return list(files.values())


def _inode(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _local_path(uri: str) -> str:
    """Path of a local file; empty for one in an object store."""
    store, path = open_store(uri)
    return path if isinstance(store, fs.LocalFileSystem) else ""


def _broken(path: str) -> DataPrepError:
    return DataPrepError(
        f"{path} is a link to {os.readlink(path)}, which does not exist; remove the link, or"
        " restore what it leads to"
    )


def _no_file(path: str) -> DataPrepError:
    return DataPrepError(
        f"{path} is a pipe or a device; expected a file, since inputs are read more than once"
    )


def _warn(message: str) -> None:
    warnings.warn(message, InputWarning, stacklevel=2)


def _input(uri: str, name: str, info: fs.FileInfo) -> InputFile:
    if info.size <= SMALL and not is_uri(uri):
        return InputFile(uri, name, info.size, xxhash.xxh64_intdigest(Path(info.path).read_bytes()))
    return InputFile(uri, name, info.size, info.mtime_ns if info.mtime is not None else 0)


def _matches(name: str, pattern: str) -> bool:
    """Match a glob by path segments: `*` stays within one, `**` spans any number."""
    return re.fullmatch(_glob_expression(pattern), name) is not None


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
