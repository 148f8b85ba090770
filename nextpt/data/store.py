"""Shard files: where they lie, whether they are whole, and how they get there.

A shard is ready when its raw file is on this machine and one process of the machine has found its
hash right. A file that is missing is fetched (data.remote) or unpacked (a zstd shard); one that is
wrong is fetched or unpacked again where that can mend it, and refused by name where it is the only
copy.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import xxhash
import zstandard

from nextpt.base.errors import ConfigError, DataError
from nextpt.data.index import File, Shard, ShardIndex, check_inside
from nextpt.data.remote import RemoteDataset, describe_mismatch
from nextpt.data.scratch import ScratchFolder

CHUNK = 2**20
# Of the limit is left in use, so that not every shard that comes has to look for one to go
ROOM = 0.95


class ShardStore:
    """The shards of one domain of one split. place: "SPLIT/DOMAIN".

    Safe to use from several threads and processes.

    Unpacked shards lie beside the downloaded ones, or in the node's folder where the dataset itself
    is local.
    """

    def __init__(
        self,
        index: ShardIndex,
        place: str,
        node: ScratchFolder,
        remote: RemoteDataset | None,
        cache: ShardCache,
    ) -> None:
        self.index, self.place, self.node, self.remote = index, place, node, remote
        self.folder = index.folder
        self._cache = cache
        own = xxhash.xxh64_hexdigest(os.fsencode(os.path.realpath(self.folder)))
        self._unpacked = self.folder if remote else node.folder / "unpacked" / own
        self._made_from_source = remote is not None or index.compressed
        if self._made_from_source:
            cache.add(self)

    def ready(self, number: int) -> Path:
        """The raw file of a shard, verified. Raises DataError that names the file."""
        shard = self.index[number]
        path, is_copy = self._locate(shard)
        if self._is_verified(path, shard.raw):
            return path
        with self.node.lock(str(path)):
            if self._is_verified(path, shard.raw):
                return path
            if not is_copy:
                if trouble := self._trouble(path, shard.raw):
                    raise DataError(
                        f"{path} is damaged: {trouble}; prepare the data again or copy it anew"
                    )
            elif not path.exists() or describe_mismatch(path, shard.raw):
                self._make(shard, path)
            mark = self.node.mark(path, shard.raw.xxh64)
            mark.touch()
        if is_copy:
            self._cache.trim(shard.raw.bytes)
        return path

    def made(self) -> Iterator[tuple[Path, float, int]]:
        """(file, when it was last opened or made, bytes) of all files here that can be fetched or unpacked again."""
        names = self.index.names()
        folders = {self._unpacked} | ({self.folder} if self.remote else set())
        for folder in folders:
            for parent, _, files in os.walk(folder):
                for file in files:
                    path = Path(parent, file)
                    if str(path.relative_to(folder)) not in names:
                        continue
                    try:
                        found = path.stat()
                        yield path, self._last_used(path, found.st_mtime), found.st_size
                    except FileNotFoundError:
                        continue  # another process took it

    def touch(self, number: int, path: Path) -> None:
        """Note that a shard is in use, so that it is not the next to go."""
        if self._made_from_source:
            try:
                os.utime(self.node.mark(path, self.index[number].raw.xxh64))
            except FileNotFoundError:
                pass  # it has been taken in this moment; whoever needs it makes it again

    def _locate(self, shard: Shard) -> tuple[Path, bool]:
        """(where the raw file is or will be, whether it can be made again)."""
        path = self.folder / shard.raw.name
        if self.remote or shard.packed is None or path.exists():
            check_inside(path, self.folder)
            return path, self.remote is not None
        return self._unpacked / shard.raw.name, True

    def _is_verified(self, path: Path, file: File) -> bool:
        try:
            return self.node.mark(path, file.xxh64).exists()
        except FileNotFoundError:
            return False

    @staticmethod
    def _trouble(path: Path, file: File) -> str | None:
        try:
            return describe_mismatch(path, file)
        except OSError as error:
            return error.strerror or str(error)

    def _last_used(self, path: Path, made: float) -> float:
        for number in self._numbers(path):
            try:
                return max(made, self.node.mark(path, self.index[number].raw.xxh64).stat().st_mtime)
            except FileNotFoundError:
                break
        return made

    def _numbers(self, path: Path) -> Iterator[int]:
        if not hasattr(self, "_by_name"):
            self._by_name = {self.index[i].raw.name: i for i in range(len(self.index))}
        for folder in (self.folder, self._unpacked):
            if (
                path.is_relative_to(folder)
                and (number := self._by_name.get(str(path.relative_to(folder)))) is not None
            ):
                yield number

    def _make(self, shard: Shard, path: Path) -> None:
        """Fetch or unpack a shard to `path`. What is there is replaced."""
        if shard.packed is None:
            self._fetch(shard.raw, path)
            return
        packed = self.folder / shard.packed.name
        check_inside(packed, self.folder)
        trouble = self._trouble(packed, shard.packed)
        if trouble and not self.remote:
            raise DataError(
                f"{packed} is damaged: {trouble}; prepare the data again or copy it anew"
            )
        if trouble:
            self._fetch(shard.packed, packed)
        path.parent.mkdir(parents=True, exist_ok=True)
        _unpack(packed, path, shard.raw)
        if self.remote:
            packed.unlink(missing_ok=True)

    def _fetch(self, file: File, target: Path) -> None:
        assert self.remote is not None
        self.remote.fetch(
            f"{self.place}/{file.name}", target, lambda path: describe_mismatch(path, file)
        )


def _unpack(packed: Path, target: Path, raw: File) -> None:
    """Write the raw form of a zstd file.

    Raises DataError when it is not what the index says; never writes more than that.
    """
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        with open(packed, "rb") as source, open(temporary, "wb") as out:
            reader = zstandard.ZstdDecompressor().stream_reader(source, read_across_frames=True)
            left = raw.bytes
            while data := reader.read(min(CHUNK, left + 1)):
                left -= len(data)
                if left < 0:
                    raise DataError(
                        f"{packed} unpacks to more than the {raw.bytes} bytes that its index says;"
                        " it is damaged or hostile"
                    )
                out.write(data)
        if trouble := describe_mismatch(temporary, raw):
            raise DataError(
                f"{packed} does not unpack to the shard of its index: {trouble}; prepare the data"
                " again"
            )
        os.replace(temporary, target)
    except zstandard.ZstdError as error:
        raise DataError(
            f"{packed} cannot be unpacked: {error}; prepare the data again or copy it anew"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


class ShardCache:
    """Keeps the files that can be made again below `limit` bytes (None: no limit).

    Those unused for longest go first.

    Only what a store reports as made is ever deleted: the only copy of a shard never is. A file
    that some process has mapped may be deleted; its map stays good. The processes of a machine look
    at the files one after another, and not again before they may together have made as much as was
    free then.
    """

    def __init__(self, node: ScratchFolder, limit: int | None) -> None:
        self.node, self.limit = node, limit
        self._stores: list[ShardStore] = []
        self._processes = int(os.environ.get("LOCAL_SIZE", "1"))
        self._free = self._made = 0

    def add(self, store: ShardStore) -> None:
        self._stores.append(store)

    def check(self, needed: int) -> None:
        """Refuse a limit that does not hold the shards that are read at the same time.

        Raises ConfigError.
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
                " would be made again and again"
            )

    def trim(self, made: int = 0) -> None:
        """Delete files when the limit may be passed. made: bytes of a file that this process has just made."""
        if self.limit is None:
            return
        self._made += made * self._processes
        if self._made < self._free:
            return
        with self.node.lock("trim"):
            files = sorted(
                (used, path, size) for store in self._stores for path, used, size in store.made()
            )
            total = sum(size for _, _, size in files)
            if total > self.limit:
                for used, path, size in files:
                    # Just made: its reader may not have opened it yet
                    if total <= ROOM * self.limit or used > time.time() - 1:
                        break
                    path.unlink(missing_ok=True)
                    total -= size
            self._free, self._made = max(self.limit - total, 0), 0
