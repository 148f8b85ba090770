"""Fetching files of a dataset from an object store, through mosaicml-streaming's downloaders.

`data.remote` is any address that streaming knows (s3://, gs://, ...; S3_ENDPOINT_URL names another
S3) or a folder.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import xxhash
from tenacity import Retrying, stop_after_attempt, wait_exponential

from data_prep.format import DatasetManifest
from data_prep.streaming_compat import import_streaming
from nextpt.base.errors import ConfigError, DataError, DataPrepError
from nextpt.base.files import sha256_file
from nextpt.data.index import File
from nextpt.data.scratch import ScratchFolder

ATTEMPTS = 3
PAUSE = 0.5  # seconds before the second attempt; four times as long before the third
TIMEOUT = 120.0  # seconds, of a read from the store


class RemoteDataset:
    """The dataset at `address`, copied file by file below `root`. Safe to use from several threads.

    Downloads go to root/.incoming and are renamed when they are whole and right, so any number of
    processes may share `root`. Raises ConfigError for an address that no downloader knows.
    """

    def __init__(self, address: str, root: Path) -> None:
        import_streaming()
        self.address, self.root = address.rstrip("/"), root
        self._own = threading.local()
        if os.path.realpath(address) == os.path.realpath(root):
            raise ConfigError(
                f"data.remote and data.path are the same folder, {address}; data.path is where"
                " copies are kept"
            )
        try:
            self._downloader()
        except (ValueError, ImportError) as error:
            raise ConfigError(f"data.remote = {address}: {error}") from None
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
        """Copy the file `name`, relative to the address, to `target`. check: what is wrong with the copy, or None.

        Tries again a few times. Raises DataError that names the file and what happened last.
        """
        temporary = (
            self._incoming
            / f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}-{target.name}"
        )
        retrying = Retrying(
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_exponential(PAUSE, exp_base=4),
            reraise=True,
        )
        try:
            retrying(self._fetch_once, name, target, temporary, check)
        except Exception as error:  # whatever the store's client raises
            problem = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"{self.address}/{name} cannot be fetched ({ATTEMPTS} attempts): {problem}"
            ) from error

    def _fetch_once(
        self, name: str, target: Path, temporary: Path, check: Callable[[Path], str | None]
    ) -> None:
        try:
            temporary.unlink(missing_ok=True)
            self._downloader().download(f"{self.address}/{name}", str(temporary), TIMEOUT)
            if problem := check(temporary):
                raise DataError(problem)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def fetch_dataset(self, node: ScratchFolder) -> None:
        """Bring everything but the shards, dataset.json last.

        One process of a machine does it, the others wait.

        Raises DataError when `root` holds another dataset.
        """
        with node.lock(f"dataset {os.path.realpath(self.root)}"):
            fresh = self.root / ".incoming" / f"{socket.gethostname()}-{os.getpid()}-dataset"
            fresh.mkdir(exist_ok=True)
            try:
                self._fetch_dataset(fresh)
            finally:
                for file in fresh.iterdir():
                    file.unlink()
                fresh.rmdir()

    def _fetch_dataset(self, fresh: Path) -> None:
        for name in ("dataset.json", "tokenizer.json"):
            self.fetch(name, fresh / name)
        try:
            manifest = DatasetManifest.load(fresh)
        except DataPrepError as error:
            raise DataError(
                f"{self.address}: {str(error).replace(str(fresh), self.address)}"
            ) from None
        present = self.root / "dataset.json"
        if present.exists() and present.read_bytes() != (fresh / "dataset.json").read_bytes():
            raise DataError(
                f"{self.root} holds copies of another dataset than {self.address}; give another"
                " data.path, or delete that folder"
            )
        missing = [
            n
            for n in ("token_bytes.npy", *(f"heldout_text/{d}.jsonl" for d in manifest.domains))
            if not (self.root / n).exists()
        ]
        for name in missing:
            if (
                name.startswith("heldout_text/")
                and not manifest.splits["heldout"][name[13:-6]].documents
            ):
                continue
            self.fetch(name, self.root / name)
        for split, domains in manifest.splits.items():
            for domain, counts in domains.items():
                target = self.root / split / domain / "index.json"
                if counts.rows and not (
                    target.exists() and sha256_file(target) == counts.index_sha256
                ):
                    self.fetch(
                        f"{split}/{domain}/index.json",
                        target,
                        lambda path, sha=counts.index_sha256: (
                            None
                            if sha256_file(path) == sha
                            else (
                                "it is not the one that dataset.json was written with (its hash"
                                " differs)"
                            )
                        ),
                    )
        for name in ("tokenizer.json", "dataset.json"):
            os.replace(fresh / name, self.root / name)

    def _downloader(self):
        """One per thread: not all of streaming's downloaders may be shared."""
        if not hasattr(self._own, "downloader"):
            storage = import_streaming("streaming.base.storage")
            self._own.downloader = storage.CloudDownloader.get(self.address)
        return self._own.downloader

    def _remove_stale(self) -> None:
        """What killed processes of this machine left behind."""
        mine = socket.gethostname() + "-"
        for path in self._incoming.iterdir():
            pid = path.name.removeprefix(mine).partition("-")[0]
            if path.name.startswith(mine) and pid.isdigit() and not psutil.pid_exists(int(pid)):
                for file in path.iterdir() if path.is_dir() else ():
                    file.unlink(missing_ok=True)
                path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)


def describe_mismatch(path: Path, expected: File) -> str | None:
    """What is wrong with a copy of a file: its size or its hash; None when it is right."""
    size = path.stat().st_size
    if size != expected.bytes:
        return f"it has {size} bytes and should have {expected.bytes}"
    digest = xxhash.xxh64()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return (
        None
        if digest.intdigest() == expected.xxh64
        else "its xxh64 differs from the one in index.json"
    )
