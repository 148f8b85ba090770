"""Worker coordination without a master, through leases in a shared folder.

Any number of processes, on any hosts that share WORK, take items until none is left. A stage is a
list of items, each of which is done when its marker file exists. A worker that takes an item
creates WORK/leases/STAGE-ITEM exclusively and keeps touching it; the lease of a worker that died is
taken over. Should two workers ever do the same item, nothing is lost: results are the same bytes
and are renamed into place. An item that fails leaves WORK/failed/STAGE-ITEM with the reason, and
the stage fails when all other items are done.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from nextpt.base.errors import DataPrepError, UserError
from nextpt.base.files import atomic_write, create_file
from nextpt.base.json_files import read_json
from nextpt.base.processes import has_ended, parse_identity, process_identity

HEARTBEAT = 5.0  # seconds between touches of a lease
# Seconds without a heartbeat after which a worker counts as dead; far above the delays of shared
# file systems
STALE = 90.0
LEASE_BYTES = 512  # room for the longest host name
POLL = 0.2  # seconds between polls of the items of other workers


@dataclass(frozen=True)
class Stage:
    """One stage of a preparation.

    Attributes:
        name: Name, also of its leases.
        sizes: Amount of work of each item.
        done: Whether item i is done.
        run: Do item i; calls its second argument with the work done, in the unit of `sizes`.
        costs: Relative time that each item takes, where that is not its size.
    """

    name: str
    sizes: Sequence[int]
    done: Callable[[int], bool]
    run: Callable[[int, Callable[[int], None]], None]
    costs: Sequence[int] | None = None


class StageError(DataPrepError):
    """Some items of a stage failed; the message is that of the first."""


def run_stage(
    stage: Stage, work: Path, worker: int, workers: int, idle: Callable[[], object] = lambda: None
) -> None:
    """Do items of a stage until all are done, by any worker.

    Args:
        stage: The stage.
        work: Work folder.
        worker: Number of this worker; it begins with its share of the items.
        workers: Number of workers.
        idle: Called when all that is left is being done by others.

    Raises:
        StageError: When some items failed, after the others are done.
    """
    started = time.time()
    pending = _in_order(stage.costs or stage.sizes, worker, workers)
    while pending:
        left = []
        for item in pending:
            if stage.done(item) or _has_failed(stage, work, item, started):
                continue
            with _lease(work, f"{stage.name}-{item}") as lease:
                if lease is None:
                    left.append(item)
                elif not stage.done(item):
                    _run(stage, work, item, lease)
        if left == pending:
            idle()
            time.sleep(POLL)
        pending = left
    failures = [
        f
        for f in (_failure(stage, work, i) for i in range(len(stage.sizes)) if not stage.done(i))
        if f
    ]
    if failures:
        more = (
            f" (and {len(failures) - 1} more like it: {work}/failed)" if len(failures) > 1 else ""
        )
        raise StageError(failures[0] + more)


def _in_order(costs: Sequence[int], worker: int, workers: int) -> list[int]:
    """Items in the order in which a worker takes them: largest first.

    So the last ones, on which the others wait, are small (Graham 1969, doi 10.1137/0117039). Each
    worker begins with every `workers`-th item and continues with what the next worker has left.
    """
    order = sorted(range(len(costs)), key=lambda i: -costs[i])
    step = max(workers, 1)
    return [item for share in range(step) for item in order[(worker + share) % step :: step]]


def _run(stage: Stage, work: Path, item: int, lease: Lease) -> None:
    try:
        stage.run(item, lease.advance)
        _failed_path(stage, work, item).unlink(missing_ok=True)
    except UserError as error:
        path = _failed_path(stage, work, item)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(str(error))


def _failed_path(stage: Stage, work: Path, item: int) -> Path:
    return work / "failed" / f"{stage.name}-{item}"


def _has_failed(stage: Stage, work: Path, item: int, started: float) -> bool:
    """Whether the item failed since this worker began; earlier failures are tried once more."""
    try:
        return _failed_path(stage, work, item).stat().st_mtime >= started - STALE / 10
    except FileNotFoundError:
        return False


def _failure(stage: Stage, work: Path, item: int) -> str | None:
    try:
        return _failed_path(stage, work, item).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


class Lease:
    """A file that names the worker of an item and its progress, kept fresh by a thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._advanced = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lease")
        self._thread.start()

    def advance(self, amount: int) -> None:
        """Report that `amount` more of the item's work is done."""
        self._advanced += amount

    def _beat(self) -> None:
        pause = 0.2  # the first beats come early, so that short items show progress
        while not self._stop.wait(pause):
            pause = min(pause * 2, HEARTBEAT)
            with suppress(OSError), open(self.path, "r+", encoding="utf-8") as file:
                file.write(_owner(self._advanced))

    def release(self) -> None:
        """Stop the thread and remove the file."""
        self._stop.set()
        self._thread.join()
        self.path.unlink(missing_ok=True)


def _owner(advanced: int) -> str:
    """Content of a lease, of constant length.

    It is written over the last one without a truncation, so it is whole whenever its worker dies.
    """
    return json.dumps(process_identity() | {"advanced": advanced}).ljust(LEASE_BYTES)


@contextmanager
def _lease(work: Path, name: str) -> Iterator[Lease | None]:
    """Hold the lease of an item while the block runs; None when another worker holds it."""
    path = work / "leases" / name
    # Without its parents: when WORK is gone, another worker has finished
    path.parent.mkdir(exist_ok=True)
    if os.path.lexists(path) and _is_dead(path):
        path.unlink(missing_ok=True)
    if not create_file(path, _owner(0)):
        yield None
        return
    lease = Lease(path)
    try:
        yield lease
    finally:
        lease.release()


def _is_dead(path: Path) -> bool:
    """Whether the holder of a lease has ended.

    That is known at once on this host, and after a silence of STALE seconds on another.
    """
    try:
        silent = time.time() - path.lstat().st_mtime
        owner = parse_identity(read_json(path))
    except FileNotFoundError:
        return False
    except (ValueError, OSError):  # being written, damaged, or no plain file
        return silent > STALE
    return silent > STALE or has_ended(owner)


def advanced(stage: Stage, work: Path, pending: set[int]) -> int:
    """Work done by all workers on items that are not finished, for a progress bar."""
    amount = 0
    for path in (work / "leases").glob(f"{stage.name}-*"):
        # A file with such a name may be of anyone, with any content
        with suppress(OSError, ValueError, KeyError, TypeError):
            item = int(path.name.rpartition("-")[2])
            if item in pending:
                amount += min(int(read_json(path)["advanced"]), stage.sizes[item])
    return amount
