"""Files where they are: local folders and object stores behind one filesystem interface, pyarrow's.

s3://, gs:// and abfs[s]:// go through pyarrow itself; every other scheme through fsspec, whose
package for that scheme must be installed. Text after the bucket is the name of an object as it is,
not percent-encoded, as in `aws s3 ls`; only file:// follows the rules of URIs.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlencode, urlsplit

import pyarrow as pa
from pyarrow import fs

from data_prep.errors import PrepError

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
        "there is no such bucket: make it, or correct its name",
    ),
    (
        r"access_denied|accessdenied|invalid_access_key|signature_does_not_match|expiredtoken|unrecognized_client|forbidden|http_status 403"
        r"|authenticationfailed|authorization|unauthenticated|permission_denied|credential|defaultazurecredential",
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


def is_uri(place: str | Path) -> bool:
    """Whether a place is an address such as s3://bucket/folder and not a path of this machine."""
    return isinstance(place, str) and _URI.fullmatch(place) is not None


def open_store(place: str | Path) -> tuple[fs.FileSystem, str]:
    """The filesystem of a place and the path in it.

    Nothing need exist there; a region of S3 is looked up over the network.

    Filesystems are kept for the length of the process and are safe to use from many threads, but
    not in a process forked after the first use. Raises PrepError for an unknown scheme, a missing
    package, or a store that does not answer.
    """
    matched = _URI.fullmatch(place) if isinstance(place, str) else None
    if matched is None:
        return fs.LocalFileSystem(), str(Path(place).expanduser().absolute())
    scheme, authority, path = matched["scheme"].lower(), matched["authority"], matched["path"]
    if scheme == "file":
        return fs.LocalFileSystem(), unquote(urlsplit(str(place)).path)
    try:
        if scheme not in _BY_PYARROW:
            return _open_fsspec(str(place))
        if not authority:
            raise PrepError(f"{place}: expected {scheme}://BUCKET/PATH")
        found = _OPTIONS.search(path)
        options = found["options"] if found else ""
        filesystem, root = _open_root(
            scheme, authority, "&".join(filter(None, [options, _defaults(scheme, options)]))
        )
    except STORE_ERRORS as error:
        raise store_problem(error, place) from error
    return filesystem, f"{root.rstrip('/')}/{path[: found.start()] if found else path}".rstrip("/")


def is_refusal(error: Exception) -> bool:
    """Whether a store answered that there is no such bucket, or that it refuses these credentials: it will say so again."""
    return _cause(" ".join(str(error).split())) in _CAUSES[:2]


def _cause(text: str) -> tuple[str, str] | None:
    return next((cause for cause in _CAUSES if re.search(cause[0], text, re.IGNORECASE)), None)


def store_problem(error: Exception, place: str | Path) -> PrepError:
    """One line about what a store answered: which place, what is wrong, and the way out where it is known."""
    text = " ".join(str(error).split())
    cause = _cause(text)
    advice = cause and cause[1]
    return PrepError(f"{place}: {advice} ({text[:300]})" if advice else f"{place}: {text[:300]}")


@functools.lru_cache(maxsize=64)
def _open_root(scheme: str, authority: str, options: str) -> tuple[fs.FileSystem, str]:
    return fs.FileSystem.from_uri(f"{scheme}://{authority}" + (f"?{options}" if options else ""))


def _defaults(scheme: str, given: str) -> str:
    """Options that pyarrow does not take from the environment, or chooses badly."""
    endpoint = next(filter(None, map(os.environ.get, ENDPOINT_VARIABLES)), None)
    if scheme == "s3" and endpoint and "endpoint_override=" not in given:
        protocol, found, host = endpoint.rpartition("://")
        return urlencode(
            {"endpoint_override": host.rstrip("/"), "scheme": protocol if found else "https"},
            safe=":",
        )
    if scheme in ("gs", "gcs") and "retry_limit_seconds=" not in given:
        return f"retry_limit_seconds={GCS_RETRY_SECONDS}"
    return ""


def _open_fsspec(place: str) -> tuple[fs.FileSystem, str]:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(place)
    except ImportError as error:
        raise PrepError(f"{place}: {error}; that package is not installed") from error
    except ValueError as error:
        raise PrepError(
            f"{place}: {error}; expected a path, s3://, gs://, abfs:// or a scheme that fsspec"
            " knows"
        ) from error
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path
