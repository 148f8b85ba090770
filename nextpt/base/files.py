"""Atomic and exclusive file writes, canonical JSON and file hashes."""

from __future__ import annotations

import errno
import filecmp
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from nextpt.base.errors import DISK_FULL, ConfigError, UserError

# Of os.link, on a file system that has no hard links
WITHOUT_LINKS = {errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
NAME_CHARACTERS = 48  # of a file's name that its temporary name repeats: names have 255 bytes


def expand_home(path: str) -> str:
    """Return the path with a leading ~ or ~USER replaced by the home folder.

    A shell leaves it to the program within a word, as in --output=~/data and code=~/code.

    Raises:
        UserError: There is no such home folder.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(
            f"{path}: there is no such home folder; for a folder of that name, give its whole path"
        )
    return expanded


@contextmanager
def atomic_write(path: Path, mode: str = "w", *, keep_same: bool = False) -> Iterator[IO[Any]]:
    """Open a temporary file beside `path` that takes its name when the block ends without an error.

    The file is synced before it is renamed, so `path` is never half written.

    Args:
        path: The file to write.
        mode: Mode of `open`; text is UTF-8.
        keep_same: Leave a file that holds the same bytes already, with its modification time.
    """
    temporary = temporary_path(path)
    with _created(temporary, path):
        with open_exclusively(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not (keep_same and path.exists() and filecmp.cmp(temporary, path, shallow=False)):
            os.replace(temporary, path)


def create_file(path: Path, content: str) -> bool:
    """Create a file that has its content from its first moment; False if it exists.

    A process that is killed meanwhile, or whose disk is full, leaves no file that nobody can read.

    Args:
        path: The file; a symbolic link in its place counts as existing.
        content: Text, written as UTF-8.
    """
    temporary = temporary_path(path)
    try:
        with _created(temporary, path):
            _write_new(temporary, content)
            return _link(temporary, path)
    except OSError as error:
        if error.errno not in WITHOUT_LINKS:
            raise
        return _create_in_place(path, content)


def _link(temporary: Path, path: Path) -> bool:
    """Give a new file its name; False if that exists."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        # NFS says so too of a link that it made, when its first answer was lost (open(2), O_EXCL)
        return os.stat(temporary).st_nlink == 2
    return True


def _create_in_place(path: Path, content: str) -> bool:
    try:
        file = open_exclusively(path, "w")
    except FileExistsError:
        return False
    try:
        with file, _naming(path):
            file.write(content)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return True


def _write_new(path: Path, content: str) -> None:
    with open_exclusively(path, "w") as file:
        file.write(content)


def temporary_path(path: Path) -> Path:
    """A hidden name beside `path` that nobody else uses and nobody can know before.

    Names of this form, `.*.tmp-*`, are removed where the processes that used them have ended.
    """
    unique = f"{os.getpid()}-{secrets.token_hex(8)}"
    return path.with_name(f".{path.name[:NAME_CHARACTERS]}.tmp-{unique}")


def open_exclusively(path: Path, mode: str) -> IO[Any]:
    """Open a new file to write; text is UTF-8.

    Args:
        path: The file; nothing may be there, and a symbolic link is not followed (O_EXCL).
        mode: Mode of `open` with `w`.

    Raises:
        FileExistsError: Something has this name.
    """
    encoding = None if "b" in mode else "utf-8"
    return open(path, mode.replace("w", "x"), encoding=encoding)


@contextmanager
def _created(temporary: Path, path: Path) -> Iterator[None]:
    """Remove a temporary file at the end, and name `path` in the error of a full disk."""
    try:
        with _naming(path):
            yield
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL and error.filename is None:  # a write names no file
            error.filename = str(path)
        raise


def make_folder(folder: Path, name: str) -> None:
    """Create a folder with its parents, where it is missing.

    Args:
        folder: The folder.
        name: Config key or option that names it, for the message.

    Raises:
        ConfigError: Something that is no folder is in the way.
        OSError: The system refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if obstacle := _obstacle(folder):
            raise ConfigError(f"{name}={folder}: {obstacle}; give another {name}") from error
        raise


def _obstacle(folder: Path) -> str | None:
    """What keeps a path from being a folder: a file or a link in its place or above it."""
    for path in (*reversed(folder.parents), folder):
        try:
            if not stat.S_ISDIR(path.stat().st_mode):
                return f"{path} is a file"
        except FileNotFoundError:
            if path.is_symlink():
                return f"{path} is a link to {os.readlink(path)}, which does not exist"
        except OSError as error:
            if error.errno == errno.ELOOP:
                return f"{path} is a link in a loop of links"
    return None


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and fixed whitespace, ending in a newline."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
