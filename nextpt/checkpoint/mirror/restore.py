"""Restore from the mirror: listing it at a start, and fetching a checkpoint into the run folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from nextpt.base.collective import RankGroup
from nextpt.base.errors import CheckpointError, StoreError, UserError, same_on_all_ranks
from nextpt.base.json_files import sync
from nextpt.base.stores import is_refusal, store_problem
from nextpt.checkpoint.errors import DamagedError, UnsupportedVersionError
from nextpt.checkpoint.folders import STAGING, unused_folder
from nextpt.checkpoint.manifest import MANIFEST, check_files, read_manifest
from nextpt.checkpoint.mirror.archive import Archive, ArchivedCheckpoint
from nextpt.checkpoint.mirror.retry import retry_call


def list_mirror(
    uri: str,
    list_checkpoints: Callable[[], list[ArchivedCheckpoint]],
    has_checkpoints: bool,
    root: Path,
    warn: Callable[[str], None],
) -> list[ArchivedCheckpoint]:
    """List the checkpoints of a mirror at a start, newest first.

    Args:
        uri: The mirror, for messages.
        list_checkpoints: Reads the list from the store.
        has_checkpoints: Whether the run folder has some. Then a store that cannot be reached is a
            warning, and the mirror catches up later.
        root: Folder of the run's checkpoints, for messages.
        warn: Receives the warning.

    Raises:
        CheckpointError: The store refuses, or cannot be reached and might hold the run.
    """
    try:
        return retry_call(list_checkpoints)
    except Exception as error:
        if isinstance(error, UserError) and not isinstance(error, StoreError):
            raise
        problem = error if isinstance(error, StoreError) else store_problem(error, uri)
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
            f"checkpoint.mirror: {problem}{more}; fix it, or start without a mirror:"
            " checkpoint.mirror=null"
        ) from error


def fetch(
    archive: Archive,
    checkpoint: ArchivedCheckpoint,
    root: Path,
    group: RankGroup,
    accept: Callable[[Path], None] = lambda folder: None,
    may_commit: Callable[[], None] = lambda: None,
) -> str | None:
    """Fetch a checkpoint of the mirror into the run folder; ranks share the files. Collective.

    Args:
        archive: The mirror.
        checkpoint: Which one.
        root: Folder of the run's checkpoints.
        group: The ranks that read.
        accept: Called on rank 0 with the complete folder before the rename; raises UserError to
            refuse a checkpoint of another run.
        may_commit: Called on rank 0 before the rename; raises to refuse.

    Returns:
        Why the checkpoint is not valid, and then nothing is left behind; None when it was fetched.

    Raises:
        CheckpointError: On all ranks, when the store does not return it or it is refused.
    """
    staging = root / f"{STAGING}fetch-{checkpoint.name}"

    def begin() -> None:
        if group.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            retry_call(partial(archive.download, checkpoint, MANIFEST, staging / MANIFEST))

    def download_share() -> None:
        names = sorted(retry_call(partial(archive.manifest, checkpoint)).files)
        for name in names[group.rank :: group.world_size]:
            target = staging / name
            retry_call(partial(archive.download, checkpoint, name, target), partial(_size, target))

    def finish() -> None:
        if group.rank == 0:
            check_files(staging, read_manifest(staging))
            accept(staging)
            sync(staging)
            may_commit()
            os.rename(staging, unused_folder(root, checkpoint.step))
            sync(root)

    try:
        for action in (begin, download_share, finish):
            if problem := _run_and_vote(action, f"{archive.uri}/{checkpoint.name}", group):
                return problem
        return None
    finally:
        if group.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _run_and_vote(action: Callable[[], None], uri: str, group: RankGroup) -> str | None:
    """Run on every rank, then vote: returns what is damaged; all ranks raise when one failed."""
    damage = failure = None
    try:
        action()
    except DamagedError as error:
        damage = str(error)
    except (UnsupportedVersionError, UserError) as error:
        failure = str(error)
    except Exception as error:
        failure = str(store_problem(error, uri))
    votes: list[list[str | None]] = group.all_gather([damage, failure])
    for rank, (_, problem) in enumerate(votes):
        if problem:
            raise same_on_all_ranks(
                CheckpointError(f"the checkpoint {uri} cannot be fetched (rank {rank}): {problem}")
            )
    return next((problem for problem, _ in votes if problem), None)
