"""A folder in an object store or on a disk: its files read, written and listed by name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from pyarrow import fs

from data_prep.stores import open_store

BLOCK = 2**22  # bytes; S3 takes parts of 5 MiB and more, which pyarrow collects
OBJECT_STORES = {"s3", "gcs", "abfs"}  # pyarrow's names of those without folders


class StoreFolder:
    """The folder `place`, which need not exist. durable: what is written to a disk survives a loss of power. background: S3 may take parts of a file later, which is faster; they wait in memory, without a bound where the link is slow.

    Methods raise one of stores.STORE_ERRORS when the store answers badly; the constructor raises
    PrepError.
    """

    def __init__(self, place: str | Path, durable: bool = False, background: bool = True) -> None:
        self.place, self.durable = str(place).rstrip("/"), durable
        self.filesystem, root = open_store(place)
        if not background and isinstance(self.filesystem, fs.S3FileSystem):
            rebuild, (options,) = self.filesystem.__reduce__()
            self.filesystem = rebuild(options | {"background_writes": False})
        self.root = root.rstrip("/")
        self._folders = self.filesystem.type_name not in OBJECT_STORES
        self._renames = isinstance(self.filesystem, fs.LocalFileSystem)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def sizes(self, below: str = "") -> dict[str, int]:
        """Size of every file, by name; of those in the folder `below` alone where it is given."""
        folder = self.path(below) if below else self.root
        infos = self.filesystem.get_file_info(
            fs.FileSelector(folder, recursive=True, allow_not_found=True)
        )
        return {
            str(PurePosixPath(i.path).relative_to(self.root)): i.size for i in infos if i.is_file
        }

    def read(self, name: str, limit: int = -1) -> bytes | None:
        """A small file, or its first `limit` bytes; None when it is not there."""
        if self.filesystem.get_file_info(self.path(name)).type is fs.FileType.NotFound:
            return None
        return b"".join(self.blocks(name, limit))

    def blocks(self, name: str, limit: int = -1) -> Iterator[bytes]:
        """The bytes of a file, or its first `limit` ones, piece by piece."""
        with self.filesystem.open_input_stream(self.path(name), compression=None) as file:
            while block := file.read(BLOCK if limit < 0 else min(BLOCK, limit)):
                limit = max(limit - len(block), 0) if limit >= 0 else limit
                yield block

    def write(self, name: str, blocks: Iterable[bytes]) -> None:
        """Object stores show an object when it is whole.

        A folder shows a file at once, so there it is renamed.
        """
        path = self.path(name)
        if self._folders:
            self.filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        shown = f"{path}.part" if self._renames else path
        with self.filesystem.open_output_stream(shown, compression=None) as stream:
            for block in blocks:
                stream.write(block)
        if self._renames:
            self._sync(shown)
            self.filesystem.move(shown, path)
            self._sync(path.rpartition("/")[0])

    def remove(self, name: str) -> None:
        self.filesystem.delete_file(self.path(name))

    def remove_folder(self, name: str) -> None:
        self.filesystem.delete_dir(self.path(name))

    def _sync(self, path: str) -> None:
        if self.durable:
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
