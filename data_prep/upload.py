"""Upload of a finished dataset to an object store or another folder, whole or not at all.

Shards go first, then the other files, then the index.json files, and dataset.json last: readers
take a folder without it for unfinished. A note beside them names the dataset that is being copied;
while it agrees, shards that are there in their full size are not sent again. It is removed at the
end. Each shard is hashed while it is sent, and compared with its index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import xxhash
from rich.console import Console

from data_prep.format import DatasetManifest
from data_prep.progress import byte_progress
from data_prep.stored import shards_of
from nextpt.base.errors import DataPrepError
from nextpt.base.stores import BLOCK, STORE_ERRORS, StoreFolder, store_problem

NOTE = ".nextpt-upload"
THREADS = 8


@dataclass(frozen=True)
class LocalFile:
    """A file to send.

    Attributes:
        path: Where it is.
        name: Path in the dataset folder.
        bytes: Size.
        xxh64: For shards, the hash that the content must have.
    """

    path: Path
    name: str
    bytes: int
    xxh64: str | None


@dataclass(frozen=True)
class Uploaded:
    """Files and bytes that an upload sent, and those that were there already."""

    sent_files: int
    sent_bytes: int
    present_files: int
    present_bytes: int


def upload(
    data: Path, remote: str, *, threads: int = THREADS, console: Console | None = None
) -> Uploaded:
    """Copy a dataset folder to an object store or another folder.

    The same call continues an upload that was cut short, and has little to do after a complete one.
    At the end every file is there in its full size.

    Args:
        data: Dataset folder.
        remote: s3://, gs://, abfs://, another scheme that fsspec knows, or a folder.
        threads: Files sent at the same time.
        console: Where progress is shown.

    Raises:
        DataPrepError: When the dataset is not whole, or another dataset is at `remote`.
        StoreError: When the store refuses.
    """
    manifest = DatasetManifest.load(data)
    shards, others, last = files_of_dataset(data, manifest)
    try:
        target = _Target(remote)
        present = target.begin(manifest)
        sizes = target.sizes()
        present_shards = [f for f in shards if present and sizes.get(f.name) == f.bytes]
        missing_shards = [f for f in shards if f not in set(present_shards)]
        with byte_progress(console) as progress:
            task = progress.add_task(
                "uploading", total=sum(f.bytes for f in (*missing_shards, *others, *last))
            )
            for stage in (missing_shards, others, *([f] for f in last)):
                _in_threads(
                    stage,
                    lambda f: target.send(f, lambda n: progress.update(task, advance=n)),
                    threads,
                )
        target.check([*shards, *others, *last])
        target.end()
    except STORE_ERRORS as error:
        raise store_problem(error, remote) from error
    sent = [*missing_shards, *others, *last]
    return Uploaded(
        len(sent),
        sum(f.bytes for f in sent),
        len(present_shards),
        sum(f.bytes for f in present_shards),
    )


def files_of_dataset(
    data: Path, manifest: DatasetManifest
) -> tuple[list[LocalFile], list[LocalFile], list[LocalFile]]:
    """(shards, other files, indices and dataset.json in their order).

    Hidden and unfinished files are left out.
    """
    shards = [
        LocalFile(shard.path, _name(shard.path, data), shard.bytes, shard.xxh64)
        for split, domains in manifest.splits.items()
        for domain in domains
        for shard in shards_of(data, manifest, split, domain)
    ]
    known = {shard.path for shard in shards}
    indices = [
        data / manifest.split_folder(split) / domain / "index.json"
        for split, domains in manifest.splits.items()
        for domain, c in domains.items()
        if c.sequences
    ]
    final = [*sorted(indices), data / "dataset.json"]
    splits = [data / manifest.split_folder(split) for split in manifest.splits]
    others = sorted(
        p
        for p in data.rglob("*")
        if p.is_file()
        and p not in known
        and p not in final
        and p.name[0] != "."
        and not any(p.is_relative_to(split) for split in splits)
    )
    others_and_final = [
        [LocalFile(p, _name(p, data), p.stat().st_size, None) for p in paths]
        for paths in (others, final)
    ]
    return shards, others_and_final[0], others_and_final[1]


def _name(path: Path, data: Path) -> str:
    return path.relative_to(data).as_posix()


class _Target(StoreFolder):
    """The location that a dataset is copied to."""

    def begin(self, manifest: DatasetManifest) -> bool:
        """Write the note; return whether files that are there may belong to this dataset.

        Raises:
            DataPrepError: When another dataset is or was being copied there.
        """
        mine = manifest.fingerprint.encode()
        note, finished = self.read(NOTE), self.read("dataset.json")
        if note not in (None, mine) or (finished is not None and mine not in finished):
            raise DataPrepError(
                f"{self.location} holds another dataset, or part of one; give another location, or"
                " remove what is there"
            )
        if note is None:
            self.write(NOTE, [mine])
        return note is not None or finished is not None

    def send(self, file: LocalFile, advance: Callable[[int], None]) -> None:
        """Copy one file.

        Raises:
            DataPrepError: When a shard is not what its index says; the copy is removed.
        """
        digest = xxhash.xxh64()

        def blocks() -> Iterator[bytes]:
            with open(file.path, "rb") as source:
                while block := source.read(BLOCK):
                    digest.update(block)
                    yield block
                    advance(len(block))

        self.write(file.name, blocks())
        if file.xxh64 not in (None, digest.hexdigest()):
            self.remove(file.name)
            raise DataPrepError(
                f"{file.path} is damaged: its xxh64 differs from the one in index.json; prepare the"
                " data again or copy it anew"
            )

    def check(self, files: list[LocalFile]) -> None:
        """Check that every file is there in its full size."""
        sizes = self.sizes()
        wrong = [f for f in files if sizes.get(f.name) != f.bytes]
        if wrong:
            raise DataPrepError(
                f"{self.location}/{wrong[0].name} has {sizes.get(wrong[0].name)} bytes after the"
                f" upload, expected {wrong[0].bytes}; start the upload again"
            )

    def end(self) -> None:
        self.remove(NOTE)


def _in_threads(files: list[LocalFile], send: Callable[[LocalFile], None], threads: int) -> None:
    """Send files at the same time; the first failure cancels those that have not begun."""
    with ThreadPoolExecutor(min(threads, len(files)) or 1) as pool:
        try:
            for sent in as_completed([pool.submit(send, file) for file in files]):
                sent.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
