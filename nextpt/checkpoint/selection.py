"""Selection of the checkpoint to resume from: the newest one that verifies, never silently less."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from nextpt.base.collective import RankGroup, run_on_rank_0
from nextpt.base.errors import CheckpointError, NoValidCheckpointError, same_on_all_ranks
from nextpt.checkpoint.folders import (
    folder_of_step,
    list_checkpoints,
    set_aside,
    set_aside_folders,
    step_of,
    steps,
)
from nextpt.checkpoint.format import Checkpoint
from nextpt.checkpoint.manifest import Lineage
from nextpt.checkpoint.verification import verify_checkpoint

T = TypeVar("T")


class _Unusable(NamedTuple):
    """A folder that is not a valid checkpoint, and why."""

    folder: Path
    problem: str

    def __str__(self) -> str:
        return f"checkpoint {self.folder} is not usable: {self.problem}"


def read_on_rank_0(root: Path, group: RankGroup, action: Callable[[], T]) -> T:
    """As `run_on_rank_0`, where an OSError means that the checkpoints under `root` are unreadable.

    Raises:
        CheckpointError: On all ranks.
    """

    def read() -> T:
        try:
            return action()
        except OSError as error:
            raise CheckpointError(f"{root} cannot be read: {error.strerror or error}") from error

    return run_on_rank_0(group, read)


def select_checkpoint(
    root: Path,
    resume: str | int,
    group: RankGroup,
    warn: Callable[[str], None],
    repair: bool = False,
) -> Checkpoint | None:
    """Find and verify the checkpoint that the config key checkpoint.resume asks for. Collective.

    Args:
        root: Folder of the run's checkpoints.
        resume: "auto": the newest (see `list_checkpoints`) that verifies. A step: the newest of
            that step. "never": there must be none.
        group: The ranks that read.
        warn: Receives one line that names damaged checkpoints newer than the result.
        repair: Set damaged newer checkpoints aside.

    Returns:
        The checkpoint; None to start from step 0.

    Raises:
        NoValidCheckpointError: There are checkpoints, and none verifies.
        CheckpointError: What was asked for is not there, or cannot be used.
    """
    names, damaged = read_on_rank_0(root, group, lambda: _candidates(root, resume))
    unusable = [_Unusable(root / name, problem) for name, problem in damaged]
    checkpoint = _first_valid(root, names, unusable, group, warn, repair)
    if checkpoint is not None:
        return checkpoint
    if resume not in ("auto", "never"):
        raise same_on_all_ranks(
            CheckpointError(f"{unusable[0]}; give another step, or checkpoint.resume=auto")
        )
    aside = read_on_rank_0(root, group, lambda: [folder.name for folder in set_aside_folders(root)])
    unusable += [_Unusable(root / name, "it was set aside as damaged") for name in aside]
    if unusable:
        raise same_on_all_ranks(
            NoValidCheckpointError(
                "; ".join(map(str, unusable))
                + ". Training does not start from nothing over them: restore one, or remove the"
                " folders"
            )
        )
    return None


def select_earlier_checkpoint(
    root: Path, step: int, lineage: Lineage, group: RankGroup, warn: Callable[[str], None]
) -> Checkpoint | None:
    """Find and verify the newest checkpoint of a lineage from before a step. Collective.

    Args:
        root: Folder of the run's checkpoints.
        step: The checkpoint's step is below this one.
        lineage: See `Manifest.lineage`.
        group: The ranks that read.
        warn: Receives one line that names damaged checkpoints, which are set aside.

    Returns:
        The checkpoint, or None when there is none.
    """

    def candidates() -> list[str]:
        return [
            checkpoint.folder.name
            for checkpoint in list_checkpoints(root).checkpoints
            if checkpoint.manifest.step < step and checkpoint.manifest.is_in(lineage)
        ]

    return _first_valid(root, read_on_rank_0(root, group, candidates), [], group, warn, repair=True)


def open_checkpoint(
    root: Path, step: int | None = None, warn: Callable[[str], None] = print
) -> Checkpoint:
    """Open the newest valid checkpoint for reading, or that of `step`; nothing is changed.

    For evaluation, generation and export, in one process.

    Raises:
        CheckpointError: There is none, or none that is valid.
    """
    group = RankGroup.world()
    checkpoint = select_checkpoint(root, "auto" if step is None else step, group, warn)
    if checkpoint is None:
        raise CheckpointError(f"{root} holds no checkpoint; train first")
    return checkpoint


def open_folder(folder: Path) -> Checkpoint:
    """Verify the checkpoint in a folder and open it for reading, in one process.

    Raises:
        CheckpointError: It is not valid.
    """
    if problem := verify_checkpoint(folder, RankGroup.world()):
        raise CheckpointError(str(_Unusable(folder, problem)))
    return Checkpoint(folder)


def try_set_aside(folder: Path) -> str:
    """Set a damaged folder aside; returns a remark about it for the warning."""
    try:
        return f" (set aside as {set_aside(folder).name})"
    except OSError as error:  # a save of that step takes another name, so training can go on
        return f" (and cannot be renamed: {error.strerror})"


def _first_valid(
    root: Path,
    names: list[str],
    unusable: list[_Unusable],
    group: RankGroup,
    warn: Callable[[str], None],
    repair: bool,
) -> Checkpoint | None:
    """The first folder that verifies. Collective.

    Args:
        root: Folder of the run's checkpoints.
        names: Folders to try, in order.
        unusable: Those already known to be; the ones before the result are added.
        group: The ranks that read.
        warn: Receives one line about the unusable ones before the result.
        repair: Set the unusable ones aside.
    """
    for folder in (root / name for name in names):
        problem = verify_checkpoint(folder, group)
        if problem is None:
            if unusable:
                remarks = read_on_rank_0(
                    root,
                    group,
                    lambda: [try_set_aside(u.folder) if repair else "" for u in unusable],
                )
                text = "; ".join(
                    f"{u}{remark}" for u, remark in zip(unusable, remarks, strict=True)
                )
                warn(f"warning: {text}; resuming from step {step_of(folder)}")
            return Checkpoint(folder)
        unusable.append(_Unusable(folder, problem))
    return None


def _candidates(root: Path, resume: str | int) -> tuple[list[str], list[tuple[str, str]]]:
    """Names of the folders to try, in order, and (name, problem) of those with a bad manifest."""
    available = steps(root)
    if resume == "never":
        if available:
            raise CheckpointError(
                f"checkpoint.resume = never, but {root} holds checkpoints (newest: step"
                f" {available[0]}); give another run.dir or remove them"
            )
        return [], []
    if isinstance(resume, int):
        if resume not in available:
            listed = ", ".join(map(str, available)) or "none"
            raise CheckpointError(
                f"checkpoint.resume = {resume}: {root} has no checkpoint of that step; there are:"
                f" {listed}"
            )
        return [folder_of_step(root, resume).name], []
    checkpoints, damaged, unsupported = list_checkpoints(root)
    if unsupported:
        # It may be valid, and newer than the others: to continue from an older one would be a
        # rollback that nobody asked for.
        raise CheckpointError(
            f"{_Unusable(*unsupported[0])}, or give checkpoint.resume=STEP to go on from another"
            " one"
        )
    return [checkpoint.folder.name for checkpoint in checkpoints], [
        (folder.name, problem) for folder, problem in damaged
    ]
