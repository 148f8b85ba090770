"""How a checkpoint comes to exist, and which one a start takes.

Save: rank 0 makes a staging folder; all ranks write and sync their files in it; sizes and hashes are gathered; rank 0
writes state.json, then manifest.json, and renames the folder. Every stage ends with a vote, so a rank that fails makes
all fail with one message and none waits for it. A process killed at any moment leaves either the whole checkpoint or
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

from nextpt.checkpoint.format import (
    FORMAT_VERSION,
    MANIFEST,
    Checkpoint,
    describe,
    hash_problem,
    manifest_problem,
    sync,
    write_json,
    write_rank,
)
from nextpt.checkpoint.ranks import Ranks
from nextpt.checkpoint.state import ShardedState
from nextpt.errors import CheckpointError

STEP_FOLDER = re.compile(r"step-(\d{9})")
STAGING = ".staging-"


@dataclass(frozen=True)
class Saved:
    """A finished checkpoint. bytes: of all files."""

    folder: Path
    bytes: int


def save(root: Path, state: ShardedState, extras: dict[str, Any], rng: dict[str, Any], ranks: Ranks,
         may_commit: Callable[[], None] = lambda: None) -> Saved:
    """Write a checkpoint of extras["step"] under `root`; returns when it is durable. Collective.

    extras: JSON values for state.json; step, world size, parameter shapes and scalars are put beside them. may_commit: asked
    on rank 0 when all is written and only the name is missing; raises to refuse. Raises
    CheckpointError on all ranks when any of them fails; then nothing is left behind.
    """
    name = f"step-{extras['step']:09d}"
    staging = root / f"{STAGING}{name}"
    described: dict[str, dict[str, Any]] = {}

    def prepare() -> None:
        if ranks.rank == 0:
            root.mkdir(parents=True, exist_ok=True)
            for stale in root.glob(f"{STAGING}*"):
                shutil.rmtree(stale)
            staging.mkdir()

    def write() -> None:
        described.update(write_rank(staging, ranks.rank, state, rng))

    def finish() -> None:
        if ranks.rank == 0:
            write_json(staging / "state.json", extras | {
                "world_size": ranks.world_size, "scalars": scalars,
                "parameters": {n: list(shape) for n, shape in state.parameter_shapes().items()},
            })
            files["state.json"] = describe(staging / "state.json")
            write_json(staging / MANIFEST, {"format_version": FORMAT_VERSION, "files": files})
            sync(staging)
            may_commit()
            _rename(staging, root / name)

    scalars = state.scalars()
    try:
        _together(prepare, root, ranks)
        _together(write, root, ranks)
        files: dict[str, Any] = {}
        for part in ranks.gather(described):
            files.update(part)
        _together(finish, root, ranks)
    except BaseException:
        if ranks.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    return Saved(root / name, sum(entry["size"] for entry in files.values()))


def _rename(staging: Path, folder: Path) -> None:
    """Give the finished folder its name; one of the same step, damaged or of an earlier attempt, makes way."""
    aside = staging.with_name(staging.name + "-replaced")
    if folder.exists():
        os.rename(folder, aside)
    os.rename(staging, folder)
    sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _together(action: Callable[[], None], root: Path, ranks: Ranks) -> None:
    """Run on every rank, then vote: all raise when one failed."""
    problem = None
    try:
        action()
    except Exception as error:  # whatever it is, the others must hear of it and not wait
        problem = _phrase(error, root)
    for rank, found in enumerate(ranks.gather(problem)):
        if found:
            failure = CheckpointError(f"saving to {root} failed on rank {rank}: {found}")
            failure.every_rank = False
            raise failure


def _phrase(error: Exception, root: Path) -> str:
    number = getattr(error, "errno", None)
    # safetensors reports an OSError of its own library as text only
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return f"no space left on the device of {root}; free some and start the same command again, it resumes"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def steps(root: Path) -> list[int]:
    """Steps of all folders that look like checkpoints, newest first."""
    found = (STEP_FOLDER.fullmatch(p.name) for p in root.iterdir()) if root.is_dir() else ()
    return sorted((int(match[1]) for match in found if match), reverse=True)


def folder_of(root: Path, step: int) -> Path:
    return root / f"step-{step:09d}"


def choose(root: Path, resume: str | int, ranks: Ranks, warn: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that `resume` asks for (config key checkpoint.resume), verified; None for a fresh start. Collective.

    "auto": the newest that verifies; damaged newer ones are named through `warn`. A step: that one. "never": none may
    be there. Raises CheckpointError otherwise.
    """
    available = ranks.from_first(steps(root))
    if resume == "never":
        if available:
            raise _same(f"checkpoint.resume = never, but {root} holds checkpoints (newest: step {available[0]}); "
                        "give another run.dir or remove them")
        return None
    if resume != "auto" and resume not in available:
        listed = ", ".join(map(str, available)) or "none"
        raise _same(f"checkpoint.resume = {resume}: {root} has no checkpoint of that step; there are: {listed}")
    problems = []
    for step in available if resume == "auto" else [resume]:
        problem = _verify(folder_of(root, step), ranks)
        if problem is None:
            if problems:
                warn(f"warning: {'; '.join(problems)}; resuming from step {step}")
            return Checkpoint(folder_of(root, step))
        problems.append(f"checkpoint {folder_of(root, step)} is not usable: {problem}")
    if problems:
        raise _same(f"{'; '.join(problems)}. Training does not start from nothing over them: restore one or remove the folders")
    return None


def _verify(folder: Path, ranks: Ranks) -> str | None:
    """First problem of a checkpoint; the files to hash are divided among the ranks."""
    problem = ranks.from_first(manifest_problem(folder))
    if problem is None:
        problem = next(filter(None, ranks.gather(hash_problem(folder, ranks.rank, ranks.world_size))), None)
    return problem


def open_newest(root: Path, step: int | None = None, warn: Callable[[str], None] = print) -> Checkpoint:
    """For readers (evaluation, generation): the newest checkpoint, or that of `step`, verified, in one process."""
    found = choose(root, "auto" if step is None else step, Ranks(), warn)
    if found is None:
        raise CheckpointError(f"{root} holds no checkpoint; train first")
    return found


def _same(message: str) -> CheckpointError:
    """An error that all ranks raise alike, so that one of them speaks."""
    error = CheckpointError(message)
    error.every_rank = False
    return error
