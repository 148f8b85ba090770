"""Shard store: brings shards to this machine, verified once, and keeps copies below a limit.

A shard can be read when its raw file is on this machine and one process of the machine has verified
its hash, since the job started or ever (data.verify). A missing file is fetched (data.remote) or
unpacked (a zstd shard). A damaged file is fetched or unpacked again where that is possible, and
refused by name where it is the only copy.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import xxhash
import zstandard

from nextpt.base.errors import ConfigError, DataError
from nextpt.base.files import open_exclusively, temporary_path
from nextpt.data.index import Shard, ShardFile, ShardIndex, check_inside
from nextpt.data.remote import RemoteDataset, describe_mismatch
from nextpt.data.scratch import ScratchFolder

CHUNK = 2**20  # bytes unpacked at a time
# Share of the limit that stays in use, so that not every new shard has to look for one to delete
_KEPT_SHARE = 0.95


class ShardStore:
    """The shards of one domain of one split. Safe for several threads and processes.

    Unpacked shards lie beside the downloaded ones, or in the scratch folder where the dataset
    itself is local.

    Args:
        index: The shards.
        name: "SPLIT/DOMAIN".
        scratch: The machine's scratch folder.
        remote: Where to fetch shards from; None for a local dataset.
        cache: Deletes copies above its limit.
        verified_since: Time, seconds since 1970, before which verifications do not count.
    """

    def __init__(
        self,
        index: ShardIndex,
        name: str,
        scratch: ScratchFolder,
        remote: RemoteDataset | None,
        cache: ShardCache,
        verified_since: float = 0.0,
    ) -> None:
        self.index = index
        self.name = name
        self.scratch = scratch
        self.remote = remote
        self.verified_since = verified_since
        self.folder = index.folder
        self._cache = cache
        own = xxhash.xxh64_hexdigest(os.fsencode(os.path.realpath(self.folder)))
        self._unpacked = self.folder if remote else scratch.folder / "unpacked" / own
        self._has_copies = remote is not None or index.is_compressed
        if self._has_copies:
            cache.add(self)

    def ensure_local(self, number: int) -> Path:
        """Bring a shard to this machine and verify it.

        Returns:
            Its raw file.

        Raises:
            DataError: It cannot be fetched or is damaged. Names the file.
        """
        shard = self.index[number]
        path, is_copy = self._locate(shard)
        if self._is_verified(path, shard.raw):
            return path
        with self.scratch.lock(str(path)):
            if self._is_verified(path, shard.raw):
                return path
            if not is_copy:
                if problem := self._problem(path, shard.raw):
                    raise _damaged(path, problem)
            elif not path.exists() or describe_mismatch(path, shard.raw):
                self._restore(shard, path)
            self.scratch.record_verified(path, shard.raw.xxh64)
        if is_copy:
            self._cache.trim(shard.raw.bytes)
        return path

    def copies(self) -> Iterator[tuple[Path, float, int]]:
        """Files that can be fetched or unpacked again: (file, time of last use, bytes)."""
        names = self.index.names()
        folders = {self._unpacked} | ({self.folder} if self.remote else set())
        for folder in folders:
            for parent, _, files in os.walk(folder):
                for file in files:
                    path = Path(parent, file)
                    if str(path.relative_to(folder)) not in names:
                        continue
                    try:
                        status = path.stat()
                        yield path, self._last_used(path, status.st_mtime), status.st_size
                    except FileNotFoundError:
                        continue  # another process deleted it

    def mark_used(self, number: int, path: Path) -> None:
        """Record that a shard is in use, so that it is not deleted next."""
        if self._has_copies:
            # A shard that was deleted meanwhile is restored by whoever needs it.
            with contextlib.suppress(FileNotFoundError):
                os.utime(self.scratch.verified_marker(path, self.index[number].raw.xxh64))

    def _locate(self, shard: Shard) -> tuple[Path, bool]:
        """(path of the raw file, whether it can be fetched or unpacked again)."""
        path = self.folder / shard.raw.name
        if self.remote or shard.compressed is None or path.exists():
            check_inside(path, self.folder)
            return path, self.remote is not None
        return self._unpacked / shard.raw.name, True

    def _is_verified(self, path: Path, file: ShardFile) -> bool:
        return self.scratch.is_verified(path, file.xxh64, self.verified_since)

    @staticmethod
    def _problem(path: Path, file: ShardFile) -> str | None:
        try:
            return describe_mismatch(path, file)
        except OSError as error:
            return error.strerror or str(error)

    def _last_used(self, path: Path, modified: float) -> float:
        for number in self._numbers(path):
            try:
                marker = self.scratch.verified_marker(path, self.index[number].raw.xxh64)
                return max(modified, marker.stat().st_mtime)
            except FileNotFoundError:
                break
        return modified

    def _numbers(self, path: Path) -> Iterator[int]:
        """Number of the shard whose raw file a path is."""
        for folder in (self.folder, self._unpacked):
            if path.is_relative_to(folder):
                number = self._number_by_name.get(str(path.relative_to(folder)))
                if number is not None:
                    yield number

    @cached_property
    def _number_by_name(self) -> dict[str, int]:
        return {self.index[i].raw.name: i for i in range(len(self.index))}

    def _restore(self, shard: Shard, path: Path) -> None:
        """Fetch or unpack a shard to `path`, replacing what is there."""
        if shard.compressed is None:
            self._fetch(shard.raw, path)
            return
        compressed = self.folder / shard.compressed.name
        check_inside(compressed, self.folder)
        problem = self._problem(compressed, shard.compressed)
        if problem and not self.remote:
            raise _damaged(compressed, problem)
        if problem:
            self._fetch(shard.compressed, compressed)
        path.parent.mkdir(parents=True, exist_ok=True)
        _unpack(compressed, path, shard.raw)
        if self.remote:
            compressed.unlink(missing_ok=True)

    def _fetch(self, file: ShardFile, target: Path) -> None:
        assert self.remote is not None
        self.remote.fetch(
            f"{self.name}/{file.name}", target, lambda path: describe_mismatch(path, file)
        )


class ShardCache:
    """Keeps the copies of shards below `limit` bytes; None: no limit.

    The least recently used are deleted first. Only what a store lists as a copy is ever deleted,
    never the only copy of a shard. A file that some process has mapped may be deleted; its map
    stays valid. The processes of a machine list the files one after another, and not again before
    they may together have written as much as was free then.
    """

    def __init__(self, scratch: ScratchFolder, limit: int | None) -> None:
        self.scratch = scratch
        self.limit = limit
        self._stores: list[ShardStore] = []
        self._processes = int(os.environ.get("LOCAL_SIZE", "1"))
        self._free = self._written = 0

    def add(self, store: ShardStore) -> None:
        """Include the copies of a store."""
        self._stores.append(store)

    def check(self, needed: int) -> None:
        """Refuse a limit below the `needed` bytes of the shards that are read at the same time.

        Raises:
            ConfigError: The limit is too low, or nothing is cached.
        """
        if self.limit is None:
            return
        if not self._stores:
            raise ConfigError(
                "data.cache_limit_gib is set, but nothing is cached: the shards are local and not"
                " compressed; leave it out"
            )
        if self.limit < needed:
            raise ConfigError(
                f"data.cache_limit_gib = {self.limit / 2**30:.3g}, but the shards that are read and"
                f" read ahead together take {needed / 2**30:.3g} GiB; raise it, or every shard"
                " would be fetched or unpacked again and again"
            )

    def trim(self, written: int = 0) -> None:
        """Delete copies if the limit may be exceeded.

        Args:
            written: Bytes of a copy that this process has just written.
        """
        if self.limit is None:
            return
        self._written += written * self._processes
        if self._written < self._free:
            return
        with self.scratch.lock("trim"):
            files = sorted(
                (used, path, size) for store in self._stores for path, used, size in store.copies()
            )
            total = sum(size for _, _, size in files)
            if total > self.limit:
                for used, path, size in files:
                    # Just written: its reader may not have opened it yet
                    if total <= _KEPT_SHARE * self.limit or used > time.time() - 1:
                        break
                    path.unlink(missing_ok=True)
                    total -= size
            self._free, self._written = max(self.limit - total, 0), 0


def _damaged(path: Path, problem: str) -> DataError:
    return DataError(f"{path} is damaged: {problem}; prepare the data again or copy it anew")


def _unpack(compressed: Path, target: Path, raw: ShardFile) -> None:
    """Write the raw form of a zstd file, never more bytes than its index says.

    Raises:
        DataError: It does not unpack to the file of the index.
    """
    temporary = temporary_path(target)
    try:
        with open(compressed, "rb") as source, open_exclusively(temporary, "wb") as out:
            reader = zstandard.ZstdDecompressor().stream_reader(source, read_across_frames=True)
            left = raw.bytes
            while data := reader.read(min(CHUNK, left + 1)):
                left -= len(data)
                if left < 0:
                    raise DataError(
                        f"{compressed} unpacks to more than the {raw.bytes} bytes that its index"
                        " says; it is damaged or hostile"
                    )
                out.write(data)
        if problem := describe_mismatch(temporary, raw):
            raise DataError(
                f"{compressed} does not unpack to the shard of its index: {problem}; prepare the"
                " data again"
            )
        os.replace(temporary, target)
    except zstandard.ZstdError as error:
        raise DataError(
            f"{compressed} cannot be unpacked: {error}; prepare the data again or copy it anew"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
