"""What the processes of one machine know in common: locks, which files were verified, room for unpacked shards.

All of it is in one folder of the machine's own disk, by default TMPDIR/nextpt-UID, and may be
deleted at any time: it only saves work. Locks are the kernel's (flock), so one that a crashed
process held is free at once.
"""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from nextpt.base.errors import ConfigError

# Files that all locks share; two names that fall on the same one only wait for each other
LOCKS = 256


class ScratchFolder:
    """folder: where; must belong to this user alone, or others could vouch for files.

    Raises ConfigError.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = (
            Path(folder) if folder else Path(tempfile.gettempdir()) / f"nextpt-{os.getuid()}"
        )
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = os.stat(self.folder, follow_symlinks=bool(folder))
            if (
                not stat.S_ISDIR(found.st_mode)
                or found.st_uid != os.getuid()
                or found.st_mode & 0o022
            ):
                raise ConfigError(
                    f"{self.folder} must be a folder that only this user can write; set"
                    " data.scratch to another"
                )
            for part in ("locks", "verified", "unpacked"):
                (self.folder / part).mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"data.scratch: {error.filename}: {error.strerror}; give a folder on this machine's"
                " disk that can be written"
            ) from None

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold the lock of a name against all processes and threads of this machine.

        Not nested: names share locks.
        """
        number = xxhash.xxh64_intdigest(os.fsencode(name)) % LOCKS
        file = os.open(
            self.folder / "locks" / str(number), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)

    def mark(self, path: Path, xxh64: int) -> Path:
        """The file that exists when `path`, as it is now, was found to have this hash.

        Raises FileNotFoundError.

        Its time of change says when the shard was last opened here.
        """
        found = os.stat(path)
        key = f"{os.path.realpath(path)}|{found.st_size}|{found.st_mtime_ns}|{found.st_ino}|{xxh64:016x}"
        return self.folder / "verified" / xxhash.xxh128_hexdigest(os.fsencode(key))
