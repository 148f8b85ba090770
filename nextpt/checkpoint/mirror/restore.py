"""A start whose run folder has lost its checkpoints, or is behind its mirror: the newest whole one comes from there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from nextpt.base.collective import RankGroup
from nextpt.base.errors import CheckpointError, StoreError, UserError
from nextpt.base.json_files import sync
from nextpt.base.stores import is_refusal, store_problem
from nextpt.checkpoint.folders import STAGING, unused_folder
from nextpt.checkpoint.manifest import (
    MANIFEST,
    DamagedError,
    UnsupportedVersionError,
    check_files,
    read_manifest,
)
from nextpt.checkpoint.mirror.archive import Archive, ArchivedCheckpoint, patiently


def look(
    place: str,
    look_there: Callable[[], list[ArchivedCheckpoint]],
    has_checkpoints: bool,
    root: Path,
    warn: Callable[[str], None],
) -> list[ArchivedCheckpoint]:
    """What a mirror holds, newest first.

    Raises CheckpointError when it refuses, or cannot be reached and might hold the run.

    has_checkpoints: whether the run folder has some. Then a store that cannot be reached is told of
    and left for later.
    """
    try:
        return patiently(look_there)
    except Exception as error:
        if isinstance(error, UserError) and not isinstance(error, StoreError):
            raise
        problem = error if isinstance(error, StoreError) else store_problem(error, place)
        if has_checkpoints and not is_refusal(error):
            warn(
                f"warning: checkpoint.mirror: {problem}; training goes on from {root}, and the"
                " mirror follows when the store answers"
            )
            return []
        more = (
            ""
            if has_checkpoints
            else (
                f". {root} has no checkpoint, and training does not start from nothing while the"
                " mirror may have some"
            )
        )
        raise CheckpointError(
            f"checkpoint.mirror: {problem}{more}; mend it, or checkpoint.mirror=null goes without"
        ) from error


def fetch(
    archive: Archive,
    stored: ArchivedCheckpoint,
    root: Path,
    ranks: RankGroup,
    accept: Callable[[Path], None] = lambda folder: None,
    may_commit: Callable[[], None] = lambda: None,
) -> str | None:
    """Bring a checkpoint of the mirror into the run's folder.

    Collective: the ranks share the files.

    Returns why it is none, and then nothing is left; None when it is there. accept: asked on rank 0
    about the whole folder before it has a name; raises UserError to refuse. Raises CheckpointError
    when the store does not give it.
    """
    staging = root / f"{STAGING}fetch-{stored.name}"

    def begin() -> None:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        patiently(lambda: archive.fetch(stored, MANIFEST, staging / MANIFEST))

    def share() -> None:
        names = sorted(patiently(lambda: archive.manifest(stored)).files)
        for name in names[ranks.rank :: ranks.world_size]:
            patiently(
                lambda name=name: archive.fetch(stored, name, staging / name),
                lambda name=name: _size(staging / name),
            )

    def finish() -> None:
        check_files(staging, read_manifest(staging))
        accept(staging)
        sync(staging)
        may_commit()
        os.rename(staging, unused_folder(root, stored.step))
        sync(root)

    try:
        for action, everywhere in ((begin, False), (share, True), (finish, False)):
            if problem := _together(
                action if everywhere or ranks.rank == 0 else lambda: None, archive, stored, ranks
            ):
                return problem
        return None
    finally:
        if ranks.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _together(
    action: Callable[[], None], archive: Archive, stored: ArchivedCheckpoint, ranks: RankGroup
) -> str | None:
    """Run on every rank, then vote: what is damaged, or None; all raise when one failed."""
    damaged = failed = None
    try:
        action()
    except DamagedError as problem:
        damaged = str(problem)
    except (UnsupportedVersionError, UserError) as problem:
        failed = str(problem)
    except Exception as error:
        failed = str(store_problem(error, f"{archive.place}/{stored.name}"))
    told = ranks.all_gather([damaged, failed])
    for rank, (_, problem) in enumerate(told):
        if problem:
            failure = CheckpointError(
                f"the checkpoint {archive.place}/{stored.name} cannot be fetched (rank {rank}):"
                f" {problem}"
            )
            failure.every_rank = False
            raise failure
    return next((problem for problem, _ in told if problem), None)
