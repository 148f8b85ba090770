"""How a checkpoint comes to exist, and which one a start takes.

Save: every rank copies its state; rank 0 makes a staging folder; all ranks write and sync their
files in it; sizes and hashes are gathered; rank 0 writes state.json, then manifest.json, and
renames the folder. Every stage ends with a vote, so a rank that fails makes all fail with one
message and none waits for it. A process killed at any moment leaves either the whole checkpoint or
a staging folder that the next save removes.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from nextpt.base.collective import RankGroup, run_on_rank_0
from nextpt.base.errors import CheckpointError, CheckpointSaveError, NoValidCheckpointError
from nextpt.base.json_files import sync, write_json
from nextpt.checkpoint.folders import (
    STAGING,
    clear_leftovers,
    folder_of_step,
    last_sequence,
    list_checkpoints,
    set_aside,
    set_aside_folders,
    step_of,
    steps,
    unused_folder,
)
from nextpt.checkpoint.format import Checkpoint, Snapshot, take_snapshot, write_rank
from nextpt.checkpoint.index import check_tensors, read_contents
from nextpt.checkpoint.manifest import (
    STATE,
    DamagedError,
    Manifest,
    UnsupportedVersionError,
    check_files,
    describe,
    extend_lineage,
    hash_problem,
    read_manifest,
    write_manifest,
)
from nextpt.checkpoint.state import ShardedState


@dataclass(frozen=True)
class CommittedCheckpoint:
    """A finished checkpoint. lineage: see Manifest; known on rank 0."""

    folder: Path
    bytes: int
    lineage: list[list[int]]


def save(
    root: Path,
    state: ShardedState,
    extras: dict[str, Any],
    rng: dict[str, Any],
    ranks: RankGroup,
    lineage: list[list[int]] = (),
    loss: float | None = None,
    may_commit: Callable[[], None] = lambda: None,
) -> CommittedCheckpoint:
    """Write a checkpoint of extras["step"] under `root`; returns when it is durable. Collective.

    extras: JSON values for state.json; step, world size, parameter shapes and scalars are put
    beside them. lineage: that of the checkpoint that this one continues. loss: of the last validation,
    nats per token. may_commit: asked on rank 0 when all is written and only the name is missing;
    raises to refuse. Raises CheckpointError on all ranks when any of them fails, CheckpointSaveError where
    the disk was the reason; then nothing is left behind.
    """
    return commit(
        root, snapshot_together(root, state, extras, rng, ranks), ranks, lineage, loss, may_commit
    )


def snapshot_together(
    root: Path, state: ShardedState, extras: dict[str, Any], rng: dict[str, Any], ranks: RankGroup
) -> Snapshot:
    """Copy the state of every rank.

    Collective; raises CheckpointError on all ranks when one fails.
    """
    taken: list[Snapshot] = []
    _together(
        lambda: taken.append(take_snapshot(state, extras, rng, ranks.world_size)), root, ranks
    )
    return taken[0]


def commit(
    root: Path,
    snapshot: Snapshot,
    ranks: RankGroup,
    lineage: list[list[int]] = (),
    loss: float | None = None,
    may_commit: Callable[[], None] = lambda: None,
    above: int = 0,
) -> CommittedCheckpoint:
    """Make a checkpoint of the snapshots of all ranks; returns when it is durable.

    Collective; raises as `save` does.

    above: a sequence number that is taken already, elsewhere.
    """
    staging = root / f"{STAGING}step-{snapshot.step:09d}"
    described: dict[str, dict[str, Any]] = {}
    saved: list[CommittedCheckpoint] = []

    def prepare() -> None:
        if ranks.rank == 0:
            root.mkdir(parents=True, exist_ok=True)
            sync(root.parent)
            clear_leftovers(root)
            staging.mkdir()

    def finish() -> None:
        if ranks.rank == 0:
            write_json(staging / STATE, snapshot.contents)
            files[STATE] = describe(staging / STATE)
            # Above the line's own too: the manifests on the disk may have become unreadable since
            # it was begun.
            sequence = 1 + max([last_sequence(root), above, *(last for _, last in lineage)])
            manifest = Manifest.model_validate(
                {
                    "files": files,
                    "step": snapshot.step,
                    "world_size": ranks.world_size,
                    "sequence": sequence,
                    "lineage": extend_lineage(list(lineage), sequence),
                    "loss": loss,
                }
            )
            write_manifest(staging, manifest)
            sync(staging)
            may_commit()
            folder = unused_folder(root, snapshot.step)
            os.rename(staging, folder)
            sync(root)
            saved.append(CommittedCheckpoint(folder, manifest.bytes, manifest.lineage))

    try:
        _together(prepare, root, ranks)
        _together(lambda: described.update(write_rank(staging, ranks.rank, snapshot)), root, ranks)
        files: dict[str, Any] = {}
        for part in ranks.all_gather(described):
            files.update(part)
        _together(finish, root, ranks)
    except BaseException:
        if ranks.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    name, size, lineage = ranks.broadcast(
        [saved[0].folder.name, saved[0].bytes, saved[0].lineage] if saved else None
    )
    return CommittedCheckpoint(root / name, size, lineage)


def _together(action: Callable[[], None], root: Path, ranks: RankGroup) -> None:
    """Run on every rank, then vote: all raise when one failed."""
    problem = None
    try:
        action()
    except Exception as error:  # whatever it is, the others must hear of it and not wait
        problem = [_phrase(error, root), _is_of_the_system(error), _number(error)]
    for rank, found in enumerate(ranks.all_gather(problem)):
        if found:
            message = f"saving to {root} failed on rank {rank}: {found[0]}"
            raise (
                CheckpointSaveError(message, rank, found[2])
                if found[1]
                else same_everywhere(message)
            )


def _number(error: Exception) -> int | None:
    """The errno of an error; safetensors has that of its own library in its text only."""
    told = (
        re.search(r"\b(?:code: |os error )(\d+)", str(error))
        if isinstance(error, SafetensorError)
        else None
    )
    return int(told[1]) if told else getattr(error, "errno", None)


def _is_of_the_system(error: Exception) -> bool:
    """Whether the disk or the system refused, and not this program or another job."""
    return isinstance(error, OSError) or (
        isinstance(error, SafetensorError) and _number(error) is not None
    )


def _phrase(error: Exception, root: Path) -> str:
    number = _number(error)
    if number is None:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    text = f"{os.strerror(number)} ({errno.errorcode.get(number, number)})"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the device of {root}: {text}; free some"
    name = getattr(error, "filename", None)
    return f"{name}: {text}" if name else text


def select_checkpoint(
    root: Path, resume: str | int, ranks: RankGroup, warn: Callable[[str], None], mend: bool = False
) -> Checkpoint | None:
    """The checkpoint that `resume` asks for (config key checkpoint.resume), verified.

    None for a fresh start. Collective.

    "auto": the newest (see folders.listing) that verifies; damaged newer ones are named through
    `warn` and, where `mend` is set, set aside. A step: the newest of that step. "never": none may
    be there. Raises CheckpointError otherwise, and NoValidCheckpointError where there are checkpoints
    and none of them verifies.
    """
    candidates, bad = run_on_rank_0(ranks, lambda: _candidates(root, resume))
    found, bad = _first_whole(root, candidates, bad, ranks, warn, mend)
    if found is not None:
        return found
    if resume not in ("auto", "never"):
        raise same_everywhere(_unusable(*bad[0]) + "; give another step, or checkpoint.resume=auto")
    aside = run_on_rank_0(ranks, lambda: [folder.name for folder in set_aside_folders(root)])
    bad += [(root / name, "it was set aside as damaged") for name in aside]
    if bad:
        raise same_everywhere(
            "; ".join(_unusable(*b) for b in bad)
            + ". Training does not start from nothing over them: restore one, "
            "or remove the folders",
            NoValidCheckpointError,
        )
    return None


def select_earlier_checkpoint(
    root: Path, step: int, lineage: list[list[int]], ranks: RankGroup, warn: Callable[[str], None]
) -> Checkpoint | None:
    """The newest checkpoint of a line from before `step` that verifies; None when there is none.

    Collective.

    Damaged ones are named through `warn` and set aside. lineage: see Manifest.
    """

    def look() -> list[str]:
        return [
            one.folder.name
            for one in list_checkpoints(root)[0]
            if one.manifest.step < step and one.manifest.is_in_lineage(lineage)
        ]

    return _first_whole(root, run_on_rank_0(ranks, look), [], ranks, warn, mend=True)[0]


def _first_whole(
    root: Path,
    candidates: list[str],
    bad: list[tuple[str, str]],
    ranks: RankGroup,
    warn: Callable[[str], None],
    mend: bool,
) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """(the first candidate that verifies, what was found bad before it).

    Collective. bad: what is known to be; see `choose`.
    """
    bad = [(root / name, problem) for name, problem in bad]
    for folder in (root / name for name in candidates):
        problem = verify(folder, ranks)
        if problem is None:
            if bad:
                done = run_on_rank_0(
                    ranks, lambda: [out_of_the_way(f) if mend else "" for f, _ in bad]
                )
                told = "; ".join(f"{_unusable(*b)}{how}" for b, how in zip(bad, done, strict=True))
                warn(f"warning: {told}; resuming from step {step_of(folder)}")
            return Checkpoint(folder), bad
        bad.append((folder, problem))
    return None, bad


def _unusable(folder: Path, problem: str) -> str:
    return f"checkpoint {folder} is not usable: {problem}"


def _candidates(root: Path, resume: str | int) -> tuple[list[str], list[tuple[str, str]]]:
    """(names of the folders to try in order, [(name, problem)] of those whose manifest says that they are none)."""
    available = steps(root)
    if resume == "never":
        if available:
            raise CheckpointError(
                f"checkpoint.resume = never, but {root} holds checkpoints (newest: step"
                f" {available[0]}); give another run.dir or remove them"
            )
        return [], []
    if resume != "auto":
        if resume not in available:
            listed = ", ".join(map(str, available)) or "none"
            raise CheckpointError(
                f"checkpoint.resume = {resume}: {root} has no checkpoint of that step; there are:"
                f" {listed}"
            )
        return [folder_of_step(root, resume).name], []
    found, damaged, foreign = list_checkpoints(root)
    if foreign:
        # It may be in order, and newer than the rest: to train on from an older one would be a
        # rollback that nobody asked for.
        raise CheckpointError(
            _unusable(*foreign[0]) + ", or give checkpoint.resume=STEP to go on from another one"
        )
    return [one.folder.name for one in found], [
        (folder.name, problem) for folder, problem in damaged
    ]


def out_of_the_way(folder: Path) -> str:
    """Set a damaged folder aside; returns what to say about it."""
    try:
        return f" (set aside as {set_aside(folder).name})"
    except OSError as error:  # a save of that step takes another name, so training can go on
        return f" (and cannot be renamed: {error.strerror})"


def verify(folder: Path, ranks: RankGroup) -> str | None:
    """First problem of a checkpoint; the files to look at are divided among the ranks.

    Collective.
    """
    problem = intact(folder, ranks)
    if problem is None:
        problem = _first(ranks.all_gather(_contents_problem(folder, ranks)))
    return problem


def intact(folder: Path, ranks: RankGroup) -> str | None:
    """First difference of a folder from its manifest, hashes included.

    What the files say is not looked at. Collective.
    """
    problem = ranks.broadcast(
        _said(lambda: check_files(folder, read_manifest(folder))) if ranks.rank == 0 else None
    )
    if problem is None:
        problem = _first(
            ranks.all_gather(
                _said(
                    lambda: hash_problem(
                        folder, read_manifest(folder), ranks.rank, ranks.world_size
                    )
                )
            )
        )
    return problem


def _contents_problem(folder: Path, ranks: RankGroup) -> str | None:
    def look() -> None:
        _, indexes = read_contents(folder)
        for rank in range(ranks.rank, len(indexes), ranks.world_size):
            check_tensors(folder, rank, indexes[rank])

    return _said(look)


def _said(look: Callable[[], str | None]) -> str | None:
    """What a look at a checkpoint finds wrong, as text.

    Whatever it raises, the other ranks must hear of it and not wait.
    """
    try:
        return look()
    except (DamagedError, UnsupportedVersionError) as problem:
        return str(problem)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _first(problems: list[str | None]) -> str | None:
    return next(filter(None, problems), None)


def open_checkpoint(
    root: Path, step: int | None = None, warn: Callable[[str], None] = print
) -> Checkpoint:
    """For readers (evaluation, generation): the newest checkpoint, or that of `step`, verified, in one process. Changes nothing."""
    found = select_checkpoint(root, "auto" if step is None else step, RankGroup.world(), warn)
    if found is None:
        raise CheckpointError(f"{root} holds no checkpoint; train first")
    return found


def same_everywhere(message: str, kind: type[CheckpointError] = CheckpointError) -> CheckpointError:
    """An error that all ranks raise alike, so that one of them speaks."""
    error = kind(message)
    error.every_rank = False
    return error
