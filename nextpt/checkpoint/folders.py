"""The folders of a run's checkpoints: their names, their order, and how they get out of the way.

    step-000000500              a checkpoint
    step-000000500.2            the second one of that step: training was rolled back and came by
    again step-000000600.damaged      one that did not verify, set aside when a start took another;
    never read, never removed .staging-*, .removing-*     a save or a removal under way, or a killed
    one; the next save clears them

A name is given once, by renaming a finished folder, and a folder that has one is never written
into.
"""

from __future__ import annotations

import os
import shutil
from itertools import count
from pathlib import Path

from nextpt.base.json_files import sync
from nextpt.checkpoint.manifest import (
    FOLDER,
    DamagedError,
    ListedCheckpoint,
    UnsupportedVersionError,
    read_manifest,
)

STAGING, REMOVING, DAMAGED = ".staging-", ".removing-", ".damaged"


def checkpoint_folders(root: Path) -> list[Path]:
    """All folders with the name of a checkpoint, newest step and attempt first."""
    found = [(match, root / match[0]) for match in map(FOLDER.fullmatch, _names(root)) if match]
    return [
        path
        for _, path in sorted(
            found, key=lambda pair: (int(pair[0][1]), int(pair[0][2] or 1)), reverse=True
        )
    ]


def _names(root: Path) -> list[str]:
    return os.listdir(root) if root.is_dir() else []


def steps(root: Path) -> list[int]:
    """Steps of all folders that look like checkpoints, highest first, each once."""
    return list(dict.fromkeys(step_of(folder) for folder in checkpoint_folders(root)))


def step_of(folder: Path) -> int:
    return int(FOLDER.fullmatch(folder.name)[1])


def folder_of_step(root: Path, step: int) -> Path:
    """The newest folder of a step; where there is none, the one that its first save would make."""
    return next(
        (f for f in checkpoint_folders(root) if step_of(f) == step), root / f"step-{step:09d}"
    )


def unused_folder(root: Path, step: int) -> Path:
    """The name for a new checkpoint of a step: one that no folder has, and above all attempts that are there."""
    taken = [FOLDER.fullmatch(f.name)[2] for f in checkpoint_folders(root) if step_of(f) == step]
    plain = root / f"step-{step:09d}"
    return (
        plain.with_name(f"{plain.name}.{max(int(t or 1) for t in taken) + 1}") if taken else plain
    )


def list_checkpoints(
    root: Path,
) -> tuple[list[ListedCheckpoint], list[tuple[Path, str]], list[tuple[Path, str]]]:
    """(checkpoints by their manifests, damaged, of another version), each newest first.

    A damaged one with its problem.

    Newest is the highest sequence number: the line of training that was saved last, at whatever
    step. Clocks and times of files decide nothing.
    """
    listed, damaged, foreign = [], [], []
    for folder in checkpoint_folders(root):
        try:
            listed.append(ListedCheckpoint(folder, read_manifest(folder)))
        except DamagedError as problem:
            damaged.append((folder, str(problem)))
        except UnsupportedVersionError as problem:
            foreign.append((folder, str(problem)))
    # stable: within one sequence number (0 for all of version 1) the order by step stays
    return sorted(listed, key=lambda found: found.manifest.sequence, reverse=True), damaged, foreign


def set_aside_folders(root: Path) -> list[Path]:
    """What `set_aside` has renamed, in order of name."""
    return sorted(
        root / name
        for name in _names(root)
        if DAMAGED in name and FOLDER.fullmatch(name.split(DAMAGED)[0])
    )


def last_sequence(root: Path) -> int:
    """The highest sequence number that any manifest under `root` carries, damaged folders' too.

    0 for none.
    """
    numbers = [found.manifest.sequence for found in list_checkpoints(root)[0]]
    for folder in set_aside_folders(root):
        try:
            numbers.append(read_manifest(folder).sequence)
        except (DamagedError, UnsupportedVersionError):
            continue
    return max(numbers, default=0)


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that no start takes it and the next save of its step has its name. Raises OSError."""
    for attempt in count(1):
        aside = folder.with_name(folder.name + DAMAGED + (f"-{attempt}" if attempt > 1 else ""))
        if not os.path.lexists(aside):
            os.rename(folder, aside)
            sync(folder.parent)
            return aside
    raise AssertionError("unreachable")


def remove(folder: Path) -> None:
    """Take away a checkpoint: its name first, at once; then its files. Raises OSError."""
    doomed = folder.with_name(REMOVING + folder.name)
    os.rename(folder, doomed)
    sync(folder.parent)  # or a power loss could bring the name back, without some of the files
    shutil.rmtree(doomed)


def clear_leftovers(root: Path) -> None:
    """Remove what killed saves and removals left. Raises OSError."""
    for name in _names(root):
        if name.startswith((STAGING, REMOVING)):
            shutil.rmtree(root / name)
