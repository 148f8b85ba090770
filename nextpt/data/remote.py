"""Remote dataset: fetches files from an object store through mosaicml-streaming's downloaders.

`data.remote` is any URI that streaming reads (s3://, gs://, ...; S3_ENDPOINT_URL names another S3)
or a folder.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import xxhash
from tenacity import Retrying, stop_after_attempt, wait_exponential

from data_prep.format import DatasetManifest
from data_prep.streaming_compat import import_streaming
from nextpt.base.errors import ConfigError, DataError, DataPrepError
from nextpt.base.files import sha256_file
from nextpt.data.index import ShardFile
from nextpt.data.scratch import ScratchFolder

ATTEMPTS = 3
PAUSE = 0.5  # seconds before the second attempt; four times as long before the third
TIMEOUT = 120.0  # seconds, of a read from the store
_HASH_BLOCK = 2**22  # bytes read at a time


class RemoteDataset:
    """The dataset at `uri`, copied file by file below `root`. Thread-safe.

    Downloads go to root/.incoming and are renamed once they are complete and verified, so any
    number of processes may share `root`.

    Raises:
        ConfigError: No downloader reads the URI, or `root` cannot be written.
    """

    def __init__(self, uri: str, root: Path) -> None:
        import_streaming()
        self.uri = uri.rstrip("/")
        self.root = root
        self._thread_local = threading.local()
        if os.path.realpath(uri) == os.path.realpath(root):
            raise ConfigError(
                f"data.remote and data.path are the same folder, {uri}; set data.path to the folder"
                " of the copies"
            )
        try:
            self._downloader()
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f"data.remote = {uri}: {error}; give a URI that mosaicml-streaming reads, or a"
                " folder"
            ) from None
        self._incoming = root / ".incoming"
        try:
            self._incoming.mkdir(parents=True, exist_ok=True)
            self._remove_stale()
        except OSError as error:
            raise ConfigError(
                f"data.path: {error.filename}: {error.strerror}; with data.remote it must be a"
                " folder that can be written"
            ) from None

    def fetch(
        self, name: str, target: Path, check: Callable[[Path], str | None] = lambda path: None
    ) -> None:
        """Copy a file, in up to ATTEMPTS attempts.

        Args:
            name: File, relative to the URI.
            target: Where to write it.
            check: Describes what is wrong with a copy; None when it is right.

        Raises:
            DataError: Every attempt failed. Names the file and the last problem.
        """
        temporary = self._new_path(target.name)
        attempts = Retrying(
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_exponential(PAUSE, exp_base=4),
            reraise=True,
        )
        try:
            attempts(self._fetch_once, name, temporary, target, check)
        except Exception as error:
            problem = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"{self.uri}/{name} cannot be fetched ({ATTEMPTS} attempts): {problem}"
            ) from None

    def fetch_dataset(self, scratch: ScratchFolder) -> None:
        """Fetch everything but the shards, dataset.json last.

        One process of a machine does it; the others wait.

        Raises:
            DataError: A file cannot be fetched, or `root` holds another dataset.
        """
        with scratch.lock(f"dataset {os.path.realpath(self.root)}"):
            fresh = self._new_path("dataset")
            fresh.mkdir()
            try:
                manifest = self._fetch_manifest(fresh)
                self._fetch_tables(manifest)
                self._fetch_indexes(manifest)
                for name in ("tokenizer.json", "dataset.json"):
                    os.replace(fresh / name, self.root / name)
            finally:
                shutil.rmtree(fresh)

    def _new_path(self, name: str) -> Path:
        """A path of this process in the folder of downloads, which nobody can know before."""
        process = f"{socket.gethostname()}-{os.getpid()}"
        return self._incoming / f"{process}-{secrets.token_hex(8)}-{name}"

    def _fetch_once(
        self, name: str, temporary: Path, target: Path, check: Callable[[Path], str | None]
    ) -> None:
        try:
            temporary.unlink(missing_ok=True)
            self._downloader().download(f"{self.uri}/{name}", str(temporary), TIMEOUT)
            if problem := check(temporary):
                raise DataError(problem)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def _fetch_manifest(self, fresh: Path) -> DatasetManifest:
        """Fetch manifest and tokenizer to `fresh`."""
        for name in ("dataset.json", "tokenizer.json"):
            self.fetch(name, fresh / name)
        try:
            manifest = DatasetManifest.load(fresh)
        except DataPrepError as error:
            raise DataError(f"{self.uri}: {str(error).replace(str(fresh), self.uri)}") from None
        present = self.root / "dataset.json"
        if present.exists() and present.read_bytes() != (fresh / "dataset.json").read_bytes():
            raise DataError(
                f"{self.root} holds copies of another dataset than {self.uri}; give another"
                " data.path, or delete that folder"
            )
        return manifest

    def _fetch_tables(self, manifest: DatasetManifest) -> None:
        """Fetch the token table and the held-out documents, where they are missing or damaged."""
        self._fetch_hashed("token_bytes.npy", manifest.token_bytes_sha256)
        names = []
        for domain, counts in manifest.splits["validation"].items():
            if counts.documents:
                names.append(f"{manifest.text_folder}/{domain}.jsonl")
        for name in names:
            if not (self.root / name).exists():
                self.fetch(name, self.root / name)

    def _fetch_indexes(self, manifest: DatasetManifest) -> None:
        """Fetch the indexes that are missing or not those of the manifest."""
        for split, domains in manifest.splits.items():
            for domain, counts in domains.items():
                if counts.sequences:
                    name = f"{manifest.split_folder(split)}/{domain}/index.json"
                    self._fetch_hashed(name, counts.index_sha256)

    def _fetch_hashed(self, name: str, sha256: str | None) -> None:
        """Fetch a file that is missing, or that has not this hash; None fits every file."""
        target = self.root / name

        def check(path: Path) -> str | None:
            if sha256 is None or sha256_file(path) == sha256:
                return None
            return "it is not the one that dataset.json was written with (its hash differs)"

        if not target.exists() or check(target) is not None:
            self.fetch(name, target, check)

    def _downloader(self) -> Any:
        """One downloader per thread: not all of streaming's may be shared."""
        if not hasattr(self._thread_local, "downloader"):
            storage = import_streaming("streaming.base.storage")
            self._thread_local.downloader = storage.CloudDownloader.get(self.uri)
        return self._thread_local.downloader

    def _remove_stale(self) -> None:
        """Remove what killed processes of this machine left behind."""
        prefix = socket.gethostname() + "-"
        for path in self._incoming.iterdir():
            pid = path.name.removeprefix(prefix).partition("-")[0]
            if path.name.startswith(prefix) and pid.isdigit() and not psutil.pid_exists(int(pid)):
                if path.is_dir():
                    for file in path.iterdir():
                        file.unlink(missing_ok=True)
                    path.rmdir()
                else:
                    path.unlink(missing_ok=True)


def describe_mismatch(path: Path, expected: ShardFile) -> str | None:
    """Describe how a file differs from its index, in size or hash; None when it is right."""
    size = path.stat().st_size
    if size != expected.bytes:
        return f"it has {size} bytes and should have {expected.bytes}"
    digest = xxhash.xxh64()
    with open(path, "rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    if digest.intdigest() != expected.xxh64:
        return "its xxh64 differs from the one in index.json"
    return None
