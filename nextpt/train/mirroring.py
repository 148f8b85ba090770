"""Mirroring during training: opens the mirror, runs it, and waits for it at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nextpt.base.collective import RankGroup
from nextpt.base.errors import ConfigError, StoreError, TrainingStopped
from nextpt.base.json_files import read_json
from nextpt.checkpoint.manifest import STATE
from nextpt.checkpoint.mirror.archive import Archive
from nextpt.checkpoint.mirror.mirror import Mirror
from nextpt.config import Config, differences, parse_config
from nextpt.events import EventBus
from nextpt.job.context import JobContext
from nextpt.train.console import print_on_rank_0

# Longest wait for the last checkpoints to be mirrored at the end of a run, seconds: 30 GB at
# 100 MB/s, sent and read back. Nothing is lost after that: the same command continues with what is
# missing.
END_SECONDS = 600.0
MARGIN = 3.0  # seconds of checkpoint.grace_seconds that are kept for ending the job


def open_mirror(config: Config, root: Path, job: JobContext) -> Mirror | None:
    """Open the mirror of checkpoint.mirror.

    Args:
        config: The run.
        root: Folder of the checkpoints.
        job: Confirms before each upload that this job still holds the run folder.

    Returns:
        None without checkpoint.mirror.

    Raises:
        ConfigError: When it is not an address of a store.
    """
    address = config.checkpoint.mirror
    if address is None:
        return None
    try:
        archive = Archive(address)
    except StoreError as error:
        raise ConfigError(f"checkpoint.mirror: {error}") from None
    return Mirror(
        archive,
        root,
        config.checkpoint,
        config.run.name,
        job.verify_lock,
        lambda folder: check_same_run(config, folder),
    )


def check_same_run(config: Config, folder: Path) -> None:
    """Refuse a mirrored checkpoint of a run that learns something else.

    Raises:
        ConfigError: With the keys that differ.
    """
    _, forbidden = differences(parse_config(read_json(folder / STATE)["config"], STATE), config)
    if forbidden:
        raise ConfigError(
            f"it is of another run ({'; '.join(forbidden)}); set these keys back, or give another"
            " checkpoint.mirror"
        )


@contextmanager
def mirroring(
    mirror: Mirror | None,
    config: Config,
    group: RankGroup,
    job: JobContext,
    events: EventBus,
) -> Iterator[None]:
    """Mirror checkpoints while the block runs, then wait for the rest. Collective.

    After a normal end or a TrainingStopped the remaining checkpoints are mirrored, as long as
    END_SECONDS and the grace period of a signal allow. After an error nothing is waited for.
    """
    if mirror is None:
        yield
        return
    if group.rank == 0:
        mirror.start()
    stopped = None
    try:
        try:
            yield
        except TrainingStopped as error:
            stopped = error
        _finish(mirror, config, group, job)
    finally:
        mirror.stop()
        for event in mirror.drain_events():
            events.publish(event)
    if stopped:
        raise stopped


def _finish(mirror: Mirror, config: Config, group: RankGroup, job: JobContext) -> None:
    """Wait on all ranks for rank 0's mirror: launchers end all ranks when one ends."""
    start, grace = time.monotonic(), config.checkpoint.grace_seconds
    left_by_rank = [
        seconds for seconds in group.all_gather(job.stop.seconds_left(grace)) if seconds is not None
    ]
    longest: float = min([END_SECONDS, *(seconds - MARGIN for seconds in left_by_rank)])

    def seconds_left() -> float:
        left = longest - (time.monotonic() - start)
        grace_left = job.stop.seconds_left(grace)  # a signal may come meanwhile
        return min(left, END_SECONDS if grace_left is None else grace_left - MARGIN)

    job.set_phase("mirroring", job.step)
    steps = group.broadcast(mirror.finish(seconds_left) if group.rank == 0 else None)
    if steps:
        print_on_rank_0(
            group,
            f"warning: not mirrored yet in {mirror.archive.uri}: the checkpoints of steps"
            f" {', '.join(map(str, steps))}; the same command continues with them",
        )
