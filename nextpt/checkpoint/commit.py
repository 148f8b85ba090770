"""Commit protocol: how all ranks write a checkpoint that exists as a whole or not at all.

Every rank copies its state; rank 0 creates a staging folder; all ranks write and sync their files
in it; sizes and hashes are gathered; rank 0 writes state.json, then manifest.json, and renames the
folder. Every stage ends with a vote, so a rank that fails makes all ranks fail with one message and
none waits for it. A process that is killed at any moment leaves the whole checkpoint, or a staging
folder that the next save removes.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from nextpt.base.collective import RankGroup
from nextpt.base.errors import CheckpointError, CheckpointSaveError, same_on_all_ranks
from nextpt.base.json_files import sync, write_json
from nextpt.checkpoint.folders import STAGING, clear_leftovers, last_sequence, unused_folder
from nextpt.checkpoint.format import Snapshot, take_snapshot, write_rank
from nextpt.checkpoint.manifest import (
    STATE,
    Lineage,
    Manifest,
    describe,
    extend_lineage,
    write_manifest,
)
from nextpt.checkpoint.state import SavedState


@dataclass(frozen=True)
class CommittedCheckpoint:
    """A durable checkpoint.

    Attributes:
        folder: Its folder.
        bytes: Size of its files.
        lineage: See `Manifest.lineage`.
    """

    folder: Path
    bytes: int
    lineage: Lineage


def save(
    root: Path,
    state: SavedState,
    extras: Mapping[str, Any],
    rng: Mapping[str, Any],
    group: RankGroup,
    lineage: Sequence[list[int]] = (),
    loss: float | None = None,
    may_commit: Callable[[], None] = lambda: None,
) -> CommittedCheckpoint:
    """Copy the state and write a checkpoint of it; returns when it is durable. Collective.

    Args:
        root: Folder of the run's checkpoints.
        state: What is saved.
        extras: JSON values for state.json, among them `step`. World size, shapes and scalars are
            added to them.
        rng: Random states of this rank.
        group: The ranks that write.
        lineage: That of the checkpoint that this one continues.
        loss: Of the last validation, nats per token.
        may_commit: Called on rank 0 when everything is written and only the rename is left; raises
            to refuse.

    Raises:
        CheckpointSaveError: On all ranks, when the disk of one did not take its part. Nothing is
            left behind.
        CheckpointError: On all ranks, when one failed for another reason.
    """
    snapshot = snapshot_on_all_ranks(root, state, extras, rng, group)
    return commit(root, snapshot, group, lineage, loss, may_commit)


def snapshot_on_all_ranks(
    root: Path,
    state: SavedState,
    extras: Mapping[str, Any],
    rng: Mapping[str, Any],
    group: RankGroup,
) -> Snapshot:
    """Copy the state of every rank. Collective; raises as `save` does."""
    snapshots: list[Snapshot] = []
    _run_and_vote(
        lambda: snapshots.append(take_snapshot(state, extras, rng, group.world_size)), root, group
    )
    return snapshots[0]


def commit(
    root: Path,
    snapshot: Snapshot,
    group: RankGroup,
    lineage: Sequence[list[int]],
    loss: float | None,
    may_commit: Callable[[], None],
    min_sequence: int = 0,
) -> CommittedCheckpoint:
    """Write a checkpoint of the snapshots of all ranks; returns when it is durable. Collective.

    Args:
        root: See `save`, as for the other arguments and the errors.
        snapshot: That of this rank.
        group: See `save`.
        lineage: See `save`.
        loss: See `save`.
        may_commit: See `save`.
        min_sequence: A sequence number that is in use in the mirror; this save's will be higher.
    """
    staging = root / f"{STAGING}step-{snapshot.step:09d}"
    own_files: dict[str, dict[str, Any]] = {}
    files: dict[str, dict[str, Any]] = {}
    committed: list[CommittedCheckpoint] = []

    def prepare() -> None:
        if group.rank == 0:
            root.mkdir(parents=True, exist_ok=True)
            sync(root.parent)
            clear_leftovers(root)
            staging.mkdir()

    def finish() -> None:
        if group.rank == 0:
            write_json(staging / STATE, snapshot.contents)
            files[STATE] = describe(staging / STATE)
            # Above the lineage's own numbers too: manifests on the disk may have become unreadable
            # since this job read them.
            last = max([last_sequence(root), min_sequence, *(last for _, last in lineage)])
            manifest = Manifest.model_validate(
                {
                    "files": files,
                    "step": snapshot.step,
                    "world_size": group.world_size,
                    "sequence": last + 1,
                    "lineage": extend_lineage(list(lineage), last + 1),
                    "loss": loss,
                }
            )
            write_manifest(staging, manifest)
            sync(staging)
            may_commit()
            folder = unused_folder(root, snapshot.step)
            os.rename(staging, folder)
            sync(root)
            committed.append(CommittedCheckpoint(folder, manifest.bytes, manifest.lineage))

    try:
        _run_and_vote(prepare, root, group)
        _run_and_vote(
            lambda: own_files.update(write_rank(staging, group.rank, snapshot)), root, group
        )
        for part in group.all_gather(own_files):
            files.update(part)
        _run_and_vote(finish, root, group)
    except BaseException:
        if group.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    name, size, new_lineage = group.broadcast(
        [committed[0].folder.name, committed[0].bytes, committed[0].lineage] if committed else None
    )
    return CommittedCheckpoint(root / name, size, new_lineage)


def _run_and_vote(action: Callable[[], None], root: Path, group: RankGroup) -> None:
    """Run on every rank, then vote: all ranks raise when one failed, whatever its error was."""
    failure = None
    try:
        action()
    except Exception as error:  # of any kind: the other ranks must learn of it and not wait
        failure = [_describe_error(error, root), _is_system_error(error), _errno(error)]
    for rank, failed in enumerate(group.all_gather(failure)):
        if failed:
            text, of_the_system, number = failed
            message = f"saving to {root} failed on rank {rank}: {text}"
            if of_the_system:
                raise CheckpointSaveError(message, rank, number)
            raise same_on_all_ranks(CheckpointError(message))


def _errno(error: Exception) -> int | None:
    """The errno of an error; safetensors gives the one of its file operations only in its text."""
    if isinstance(error, SafetensorError):
        match = re.search(r"\b(?:code: |os error )(\d+)", str(error))
        if match:
            return int(match[1])
    return getattr(error, "errno", None)


def _is_system_error(error: Exception) -> bool:
    """Whether the disk or the operating system refused, and not this program or another job."""
    return isinstance(error, OSError) or (
        isinstance(error, SafetensorError) and _errno(error) is not None
    )


def _describe_error(error: Exception, root: Path) -> str:
    number = _errno(error)
    if number is None:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    text = f"{os.strerror(number)} ({errno.errorcode.get(number, number)})"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the device of {root}: {text}; free some"
    name = getattr(error, "filename", None)
    return f"{name}: {text}" if name else text
