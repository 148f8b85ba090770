"""Checkpoint folders of a run: names, order, setting aside, removal.

    step-000000500              a checkpoint
    step-000000500.2            the second one of that step, saved after a rollback
    step-000000600.damaged      one that did not verify; never read again, never removed
    .staging-*, .removing-*     a save or a removal that is under way or was killed; the next save
                                removes them

A folder gets its name once, by renaming a finished folder, and is never written to afterwards.
"""

from __future__ import annotations

import os
import re
import shutil
from itertools import count
from pathlib import Path
from typing import NamedTuple

from nextpt.base.json_files import sync
from nextpt.checkpoint.errors import DamagedError, UnsupportedVersionError
from nextpt.checkpoint.manifest import FOLDER, ListedCheckpoint, read_manifest

STAGING, REMOVING, DAMAGED = ".staging-", ".removing-", ".damaged"


class Listing(NamedTuple):
    """Checkpoint folders of a run by what their manifests say; each part newest first.

    Attributes:
        checkpoints: Folders with a valid manifest; their other files were not read.
        damaged: (folder, problem) of those without one.
        unsupported: (folder, problem) of those of a newer format.
    """

    checkpoints: list[ListedCheckpoint]
    damaged: list[tuple[Path, str]]
    unsupported: list[tuple[Path, str]]


def checkpoint_folders(root: Path) -> list[Path]:
    """All folders with the name of a checkpoint, highest step and attempt first."""
    matches = [match for match in map(FOLDER.fullmatch, _names(root)) if match]
    matches.sort(key=lambda match: (int(match[1]), _attempt(match)), reverse=True)
    return [root / match[0] for match in matches]


def _attempt(match: re.Match[str]) -> int:
    return int(match[2] or 1)


def _names(root: Path) -> list[str]:
    return os.listdir(root) if root.is_dir() else []


def steps(root: Path) -> list[int]:
    """Steps of all folders with the name of a checkpoint, highest first, each once."""
    return list(dict.fromkeys(step_of(folder) for folder in checkpoint_folders(root)))


def step_of(folder: Path) -> int:
    """Step in the name of a checkpoint's folder."""
    return int(_parse(folder)[1])


def _parse(folder: Path) -> re.Match[str]:
    match = FOLDER.fullmatch(folder.name)
    assert match is not None, f"{folder} does not have the name of a checkpoint"
    return match


def folder_of_step(root: Path, step: int) -> Path:
    """Newest folder of a step; the one that its first save would create where there is none."""
    return next(
        (f for f in checkpoint_folders(root) if step_of(f) == step), root / f"step-{step:09d}"
    )


def unused_folder(root: Path, step: int) -> Path:
    """Folder for a new checkpoint of a step: the attempt after all that are there."""
    attempts = [_attempt(_parse(f)) for f in checkpoint_folders(root) if step_of(f) == step]
    name = f"step-{step:09d}"
    return root / (f"{name}.{max(attempts) + 1}" if attempts else name)


def list_checkpoints(root: Path) -> Listing:
    """List the checkpoints of a run by their manifests, newest first.

    The newest is the one with the highest sequence number, which was saved last, at whatever step.
    Clocks and times of files decide nothing.
    """
    checkpoints, damaged, unsupported = [], [], []
    for folder in checkpoint_folders(root):
        try:
            checkpoints.append(ListedCheckpoint(folder, read_manifest(folder)))
        except DamagedError as problem:
            damaged.append((folder, str(problem)))
        except UnsupportedVersionError as problem:
            unsupported.append((folder, str(problem)))
    # Stable: checkpoints with the same sequence number (0 in version 1) stay ordered by step.
    checkpoints.sort(key=lambda checkpoint: checkpoint.manifest.sequence, reverse=True)
    return Listing(checkpoints, damaged, unsupported)


def set_aside_folders(root: Path) -> list[Path]:
    """Folders that `set_aside` has renamed, in order of name."""
    return sorted(
        root / name
        for name in _names(root)
        if DAMAGED in name and FOLDER.fullmatch(name.split(DAMAGED)[0])
    )


def last_sequence(root: Path) -> int:
    """Highest sequence number of any manifest under `root`, also in folders set aside; else 0."""
    numbers = [checkpoint.manifest.sequence for checkpoint in list_checkpoints(root).checkpoints]
    for folder in set_aside_folders(root):
        try:
            numbers.append(read_manifest(folder).sequence)
        except (DamagedError, UnsupportedVersionError):
            continue
    return max(numbers, default=0)


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that no start reads it and its step can be saved again.

    Returns:
        The new path.

    Raises:
        OSError: The folder cannot be renamed.
    """
    for attempt in count(1):
        target = folder.with_name(folder.name + DAMAGED + (f"-{attempt}" if attempt > 1 else ""))
        if not os.path.lexists(target):
            os.rename(folder, target)
            sync(folder.parent)
            return target
    raise AssertionError("unreachable")


def remove(folder: Path) -> None:
    """Remove a checkpoint: its name first, at once, then its files. Raises OSError."""
    doomed = folder.with_name(REMOVING + folder.name)
    os.rename(folder, doomed)
    sync(folder.parent)  # or a power loss could bring the name back without some of the files
    shutil.rmtree(doomed)


def leftovers(root: Path, prefixes: tuple[str, ...] = (STAGING,)) -> list[Path]:
    """Folders of saves that are under way or were killed; no files and no links."""
    return [path for path in _hidden(root, prefixes) if _is_folder(path)]


def stray_files(root: Path) -> list[Path]:
    """Files and links with the name of a save's folder: no job of ours creates them."""
    return [path for path in _hidden(root, (STAGING, REMOVING)) if not _is_folder(path)]


def _hidden(root: Path, prefixes: tuple[str, ...]) -> list[Path]:
    return [root / name for name in _names(root) if name.startswith(prefixes)]


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def clear_leftovers(root: Path) -> None:
    """Remove the folders that killed saves and removals left. Raises OSError."""
    for path in leftovers(root, (STAGING, REMOVING)):
        shutil.rmtree(path)
