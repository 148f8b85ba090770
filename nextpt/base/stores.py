"""Object stores and local folders behind one filesystem interface, pyarrow's.

s3://, gs:// and abfs[s]:// go through pyarrow itself; every other scheme goes through fsspec, whose
package for that scheme must be installed. The text after the bucket is the object's name as it is,
not percent-encoded, as in `aws s3 ls`; only file:// follows the rules of URIs.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlencode, urlsplit

import pyarrow as pa
from pyarrow import fs

from nextpt.base.errors import StoreError

_URI = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/?]*)/?(?P<path>.*)", re.DOTALL
)
# Options of pyarrow's that may follow a path, such as ?region=eu-west-1; a bare ? belongs to a name
# or a glob.
_OPTIONS = re.compile(r"\?(?P<options>\w+=[^?]*)$")
_BY_PYARROW = {"s3", "gs", "gcs", "abfs", "abfss"}
# AWS's names for an S3 that is not Amazon's, after the one of mosaicml-streaming, which reads the
# shards later.
ENDPOINT_VARIABLES = ("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
# What a filesystem's methods raise when a store answers badly; store_problem makes one line of it.
# Azure's client raises pyarrow's own error where the others raise OSError.
STORE_ERRORS = (OSError, pa.ArrowException)
# Seconds. Google's client would try for 15 minutes, in silence, where there is no network or no
# account.
GCS_RETRY_SECONDS = 60

# What a message of a store's client holds -> what is wrong, and what to do.
_CAUSES = (
    (
        r"no_such_bucket|containernotfound|bucket does not exist|no such bucket",
        "there is no such bucket: create it, or correct its name",
    ),
    (
        (
            r"access_denied|accessdenied|invalid_access_key|signature_does_not_match"
            r"|expiredtoken|unrecognized_client|forbidden|http_status 403|authenticationfailed"
            r"|authorization|unauthenticated|permission_denied|credential|defaultazurecredential"
        ),
        (
            "the store refuses these credentials, or there are none: set them as its own command"
            " line does (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, `gcloud auth"
            " application-default login`, `az login`)"
        ),
    ),
    (
        (
            r"network_connection|could not (resolve|connect)|couldn't resolve|connection"
            r" refused|timed? ?out|unavailable|unreachable|endpointconnection"
        ),
        (
            "the store cannot be reached: is there a network, and is the address right? (an S3 of"
            f" your own: {ENDPOINT_VARIABLES[0]})"
        ),
    ),
)


def is_uri(location: str | Path) -> bool:
    """Whether a location is a URI such as s3://bucket/folder and not a path of this machine."""
    return isinstance(location, str) and _URI.fullmatch(location) is not None


def open_store(location: str | Path) -> tuple[fs.FileSystem, str]:
    """Open the filesystem of a location.

    Nothing need exist there; the region of an S3 bucket is looked up over the network. Filesystems
    are kept for the life of the process. They may be used from many threads, but not in a process
    that was forked after the first use.

    Returns:
        The filesystem, and the path of the location in it.

    Raises:
        StoreError: For an unknown scheme, a missing package, or a store that does not answer.
    """
    matched = _URI.fullmatch(location) if isinstance(location, str) else None
    if matched is None:
        return fs.LocalFileSystem(), str(Path(location).expanduser().absolute())
    scheme, authority, path = matched["scheme"].lower(), matched["authority"], matched["path"]
    if scheme == "file":
        return fs.LocalFileSystem(), unquote(urlsplit(str(location)).path)
    try:
        if scheme not in _BY_PYARROW:
            return _open_fsspec(str(location))
        if not authority:
            raise StoreError(f"{location}: expected {scheme}://BUCKET/PATH")
        match = _OPTIONS.search(path)
        options = match["options"] if match else ""
        filesystem, root = _open_root(
            scheme, authority, "&".join(filter(None, [options, _defaults(scheme, options)]))
        )
    except STORE_ERRORS as error:
        raise store_problem(error, location) from error
    return filesystem, f"{root.rstrip('/')}/{path[: match.start()] if match else path}".rstrip("/")


def is_refusal(error: Exception) -> bool:
    """Whether a store refused the bucket or the credentials, so that a retry is useless."""
    return _cause(" ".join(str(error).split())) in _CAUSES[:2]


def _cause(text: str) -> tuple[str, str] | None:
    return next((cause for cause in _CAUSES if re.search(cause[0], text, re.IGNORECASE)), None)


def store_problem(error: Exception, location: str | Path) -> StoreError:
    """The error for what a store answered: location, cause, and the fix where it is known."""
    text = " ".join(str(error).split())
    cause = _cause(text)
    advice = cause and cause[1]
    return StoreError(
        f"{location}: {advice} ({text[:300]})" if advice else f"{location}: {text[:300]}"
    )


@functools.lru_cache(maxsize=64)
def _open_root(scheme: str, authority: str, options: str) -> tuple[fs.FileSystem, str]:
    opened: tuple[fs.FileSystem, str] = fs.FileSystem.from_uri(
        f"{scheme}://{authority}" + (f"?{options}" if options else "")
    )
    return opened


def _defaults(scheme: str, options: str) -> str:
    """Options that pyarrow does not take from the environment, or chooses badly."""
    endpoint = next(filter(None, map(os.environ.get, ENDPOINT_VARIABLES)), None)
    if scheme == "s3" and endpoint and "endpoint_override=" not in options:
        protocol, separator, host = endpoint.rpartition("://")
        return urlencode(
            {"endpoint_override": host.rstrip("/"), "scheme": protocol if separator else "https"},
            safe=":",
        )
    if scheme in ("gs", "gcs") and "retry_limit_seconds=" not in options:
        return f"retry_limit_seconds={GCS_RETRY_SECONDS}"
    return ""


def _open_fsspec(location: str) -> tuple[fs.FileSystem, str]:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(location)
    except ImportError as error:
        raise StoreError(f"{location}: {error}; that package is not installed") from error
    except ValueError as error:
        raise StoreError(
            f"{location}: {error}; expected a path, s3://, gs://, abfs:// or a scheme that fsspec"
            " knows"
        ) from error
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path


BLOCK = 2**22  # bytes; S3 takes parts of 5 MiB and more, which pyarrow collects
OBJECT_STORES = {"s3", "gcs", "abfs"}  # pyarrow's names of those without folders


class StoreFolder:
    """A folder in an object store or on a disk, whose files are read, written and listed by name.

    Methods raise one of STORE_ERRORS when the store answers badly.

    Args:
        location: URI or path of the folder, which need not exist.
        durable: Sync what is written to a disk, so that it survives a loss of power.
        background: Let S3 take parts of a file while the next ones are produced. That is faster,
            but the parts wait in memory, without a bound where the link is slow.

    Raises:
        StoreError: When the location names no store that can be opened.
    """

    def __init__(
        self, location: str | Path, durable: bool = False, background: bool = True
    ) -> None:
        self.location = str(location).rstrip("/")
        self.durable = durable
        self.filesystem, root = open_store(location)
        if not background and isinstance(self.filesystem, fs.S3FileSystem):
            rebuild, (options,) = self.filesystem.__reduce__()
            self.filesystem = rebuild(options | {"background_writes": False})
        self.root = root.rstrip("/")
        self._folders = self.filesystem.type_name not in OBJECT_STORES
        self._renames = isinstance(self.filesystem, fs.LocalFileSystem)

    def path(self, name: str) -> str:
        """Path of a file in the filesystem."""
        return f"{self.root}/{name}"

    def sizes(self, below: str = "") -> dict[str, int]:
        """Sizes in bytes of all files by name, or of those in the folder `below` alone."""
        folder = self.path(below) if below else self.root
        infos = self.filesystem.get_file_info(
            fs.FileSelector(folder, recursive=True, allow_not_found=True)
        )
        return {
            str(PurePosixPath(i.path).relative_to(self.root)): i.size for i in infos if i.is_file
        }

    def read(self, name: str, limit: int = -1) -> bytes | None:
        """Content of a small file, or its first `limit` bytes; None without such a file."""
        if self.filesystem.get_file_info(self.path(name)).type is fs.FileType.NotFound:
            return None
        return b"".join(self.blocks(name, limit))

    def blocks(self, name: str, limit: int = -1) -> Iterator[bytes]:
        """Blocks of a file's bytes, or of its first `limit` bytes."""
        with self.filesystem.open_input_stream(self.path(name), compression=None) as file:
            while block := file.read(BLOCK if limit < 0 else min(BLOCK, limit)):
                limit = max(limit - len(block), 0) if limit >= 0 else limit
                yield block

    def write(self, name: str, blocks: Iterable[bytes]) -> None:
        """Write a file that becomes visible when it is whole.

        Object stores show an object when it is whole. A folder shows a file at once, so there the
        file is written under another name and renamed.
        """
        path = self.path(name)
        if self._folders:
            self.filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        visible = f"{path}.part" if self._renames else path
        with self.filesystem.open_output_stream(visible, compression=None) as stream:
            for block in blocks:
                stream.write(block)
        if self._renames:
            self._sync(visible)
            self.filesystem.move(visible, path)
            self._sync(path.rpartition("/")[0])

    def remove(self, name: str) -> None:
        """Remove a file."""
        self.filesystem.delete_file(self.path(name))

    def remove_folder(self, name: str) -> None:
        """Remove a folder of the folder, and everything in it."""
        self.filesystem.delete_dir(self.path(name))

    def _sync(self, path: str) -> None:
        if self.durable:
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
