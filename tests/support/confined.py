"""Run a function that reads a damaged file: in bounded time and memory, writing in one folder."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

from nextpt.base.errors import LONGEST_MESSAGE, UserError

SECONDS = 10
MEMORY = 2 * 2**30  # bytes beyond what the process has mapped
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate")
STARTS = ("subprocess.Popen", "os.system", "os.fork", "os.exec", "os.posix_spawn")


class HangError(BaseException):
    """The function took longer than SECONDS; no `except Exception` catches it."""


class _Watch:
    """What the audit hook, which cannot be removed, allows and has seen."""

    folder: ClassVar[str | None] = None
    seen: ClassVar[list[str]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _Watch.folder is None:
        return
    if event in STARTS:
        _Watch.seen.append(f"{event} {arguments[0]!r}")
        return
    paths: list[Any] = []
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
        paths = [arguments[0]]
    elif event in CHANGES:
        paths = [value for value in arguments[:2] if isinstance(value, str | bytes | os.PathLike)]
    for path in paths:
        if isinstance(path, int):
            continue
        text = os.path.abspath(os.fsdecode(path))
        if not text.startswith(_Watch.folder) and text != os.devnull and "__pycache__" not in text:
            _Watch.seen.append(f"{event} {text}")


@contextmanager
def _limits() -> Iterator[None]:
    def hang(signal_number: int, frame: FrameType | None) -> None:
        raise HangError(f"longer than {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    mapped = pages * resource.getpagesize()
    handler = signal.signal(signal.SIGALRM, hang)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, before[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, handler)


def read_confined(read: Callable[[Path], object], folder: Path, allowed: Path) -> str | None:
    """Call `read` on a folder.

    Args:
        read: What a command does with the files.
        folder: Has the files.
        allowed: The only folder in which it may write.

    Returns:
        The message where it refused; None where it returned.

    Raises:
        AssertionError: It wrote elsewhere or started a process, or its refusal is not one line.
        HangError: It took too long.
        Exception: Whatever it raised that is not an error for users.
    """
    if not getattr(_audit, "added", False):
        sys.addaudithook(_audit)
        _audit.added = True  # type: ignore[attr-defined]
    _Watch.folder, _Watch.seen = str(allowed.absolute()), []
    message: str | None = None
    try:
        with _limits():
            read(folder)
    except UserError as error:
        message = str(error)
    except OSError as error:
        # The command line shows one line of it, with the file
        if error.filename is None:
            raise
        message = f"{error.filename}: {error.strerror}"
    finally:
        _Watch.folder = None
    assert not _Watch.seen, _Watch.seen
    if message is not None:
        assert message.strip()
        assert len(message.splitlines()) == 1, message
        assert len(message) <= LONGEST_MESSAGE, len(message)
    return message
