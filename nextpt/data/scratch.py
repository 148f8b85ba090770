"""Scratch folder of a machine: locks, records of verified files, room for unpacked shards.

All processes of one machine share it. It lies on the machine's own disk, by default in
TMPDIR/nextpt-UID, and may be deleted at any time: it only saves work. Locks are the kernel's
(flock), so the lock of a crashed process is free at once.
"""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from nextpt.base.errors import ConfigError

# Lock files; two names that share one only wait for each other.
_LOCKS = 256


class ScratchFolder:
    """The scratch folder of this machine.

    Args:
        folder: Where it is. It must belong to this user alone, or others could vouch for files.

    Raises:
        ConfigError: It cannot be written, or others can write it.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = (
            Path(folder) if folder else Path(tempfile.gettempdir()) / f"nextpt-{os.getuid()}"
        )
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = os.stat(self.folder, follow_symlinks=bool(folder))
            is_private = status.st_uid == os.getuid() and not status.st_mode & 0o022
            if not stat.S_ISDIR(status.st_mode) or not is_private:
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

        Locks cannot be nested: names share them.
        """
        number = xxhash.xxh64_intdigest(os.fsencode(name)) % _LOCKS
        file = os.open(
            self.folder / "locks" / str(number), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)

    def is_verified(self, path: Path, xxh64: int, since: float = 0.0) -> bool:
        """Whether `path`, as it is now, was verified to have this hash.

        Args:
            path: A file; one that does not exist counts as not verified.
            xxh64: Its hash.
            since: Verifications before this time do not count: a disk may have damaged the file
                since, which leaves its modification time as it was.
        """
        try:
            content = self.verified_marker(path, xxh64).read_text(encoding="ascii")
        except FileNotFoundError:
            return False
        try:
            return float(content or 0.0) >= since  # empty in markers of before 2026-12
        except ValueError:
            return False

    def record_verified(self, path: Path, xxh64: int) -> None:
        """Record that `path`, as it is now, was verified to have this hash."""
        with suppress(OSError):  # a full disk: the file is verified again when it is next opened
            self.verified_marker(path, xxh64).write_text(repr(time.time()), encoding="ascii")

    def verified_marker(self, path: Path, xxh64: int) -> Path:
        """The marker file that exists if `path`, as it is now, was verified to have this hash.

        It holds the time of the verification, seconds since 1970. Its modification time says when
        the shard was last opened on this machine.

        Raises:
            FileNotFoundError: `path` does not exist.
        """
        status = os.stat(path)
        key = "|".join(
            (
                os.path.realpath(path),
                str(status.st_size),
                str(status.st_mtime_ns),
                str(status.st_ino),
                f"{xxh64:016x}",
            )
        )
        return self.folder / "verified" / xxhash.xxh128_hexdigest(os.fsencode(key))
