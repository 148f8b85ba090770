"""The mirror of a run's checkpoints, from the start of its training to the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nextpt.base.collective import RankGroup
from nextpt.base.errors import ConfigError, DataPrepError, TrainingStopped
from nextpt.base.json_files import read_json
from nextpt.checkpoint.manifest import STATE
from nextpt.checkpoint.mirror.archive import Archive
from nextpt.checkpoint.mirror.mirror import Mirror
from nextpt.config import Config, differences, parse_config
from nextpt.events import Event
from nextpt.job.context import JobContext

# Seconds that the end of a run may wait for its last checkpoints to be mirrored: 30 GB at 100 MB/s,
# sent and read back. Nothing is lost after that: the same command goes on with what is missing.
END_SECONDS = 600.0
MARGIN = 3.0  # seconds of checkpoint.grace_seconds that are left for the rest of the end


def open_mirror(config: Config, root: Path, job: JobContext) -> Mirror | None:
    """The mirror that checkpoint.mirror names; None without. root: of the checkpoints.

    Raises ConfigError for an address that is none.
    """
    place = config.checkpoint.mirror
    if place is None:
        return None
    try:
        archive = Archive(place)
    except DataPrepError as error:
        raise ConfigError(f"checkpoint.mirror: {error}") from None
    return Mirror(
        archive,
        root,
        config.checkpoint,
        config.run.name,
        job.may_commit,
        lambda folder: check_same_run(config, folder),
    )


def check_same_run(config: Config, folder: Path) -> None:
    """Refuse a checkpoint of a run that differs in what it learns. Raises ConfigError."""
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
    ranks: RankGroup,
    job: JobContext,
    emit: Callable[[Event], None],
    say: Callable[[str], None],
) -> Iterator[None]:
    """Mirror while the block runs.

    When it ends, or was told to stop, wait for the rest as long as that may take. Collective.
    """
    if mirror is None:
        yield
        return
    if ranks.rank == 0:
        mirror.begin()
    stopped = None
    try:
        try:
            yield
        except TrainingStopped as end:
            stopped = end
        _finish(mirror, config, ranks, job, say)
    finally:
        mirror.end()
        for event in mirror.news():
            emit(event)
    if stopped:
        raise stopped


def _finish(
    mirror: Mirror, config: Config, ranks: RankGroup, job: JobContext, say: Callable[[str], None]
) -> None:
    """All ranks wait for the first, for launchers end all when one ends."""
    begun, grace = time.monotonic(), config.checkpoint.grace_seconds
    told = [
        seconds for seconds in ranks.all_gather(job.stop.seconds_left(grace)) if seconds is not None
    ]
    most = min([END_SECONDS, *(seconds - MARGIN for seconds in told)])

    def seconds_left() -> float:
        since = job.stop.seconds_left(grace)  # a signal may come meanwhile
        return min(
            most - (time.monotonic() - begun), END_SECONDS if since is None else since - MARGIN
        )

    job.set_phase("mirroring", job.progress.step)
    steps = ranks.broadcast(mirror.finish(seconds_left) if ranks.rank == 0 else None)
    if steps:
        say(
            f"warning: not mirrored yet in {mirror.archive.place}: the checkpoints of steps"
            f" {', '.join(map(str, steps))}; the same command goes on with them"
        )
