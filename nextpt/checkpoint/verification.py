"""Verification of a checkpoint: manifest, sizes, hashes, contents; the ranks share the files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from nextpt.base.collective import RankGroup
from nextpt.checkpoint.errors import DamagedError, UnsupportedVersionError
from nextpt.checkpoint.index import check_tensors, read_contents
from nextpt.checkpoint.manifest import check_files, hash_problem, read_manifest


def verify_checkpoint(folder: Path, group: RankGroup) -> str | None:
    """Verify a checkpoint: its files against the manifest, and their contents. Collective.

    Returns:
        The first problem, the same on all ranks; None for a valid checkpoint.
    """
    problem = verify_files(folder, group)
    if problem is None:
        problem = _first(group.all_gather(_problem(lambda: _check_contents(folder, group))))
    return problem


def verify_files(folder: Path, group: RankGroup) -> str | None:
    """Compare a folder's files with its manifest, hashes included. Collective.

    What the files contain is not checked.

    Returns:
        The first difference, the same on all ranks; None without one.
    """
    problem: str | None = group.broadcast(
        _problem(lambda: check_files(folder, read_manifest(folder))) if group.rank == 0 else None
    )
    if problem is None:
        problem = _first(group.all_gather(_problem(lambda: _check_hashes(folder, group))))
    return problem


def _check_hashes(folder: Path, group: RankGroup) -> None:
    problem = hash_problem(folder, read_manifest(folder), group.rank, group.world_size)
    if problem is not None:
        raise DamagedError(problem)


def _check_contents(folder: Path, group: RankGroup) -> None:
    _, indexes = read_contents(folder)
    for rank in range(group.rank, len(indexes), group.world_size):
        check_tensors(folder, rank, indexes[rank])


def _problem(check: Callable[[], None]) -> str | None:
    """Text of what a check raises, of any kind: the other ranks must learn of it and not wait."""
    try:
        check()
    except (DamagedError, UnsupportedVersionError) as problem:
        return str(problem)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _first(problems: Iterable[str | None]) -> str | None:
    return next(filter(None, problems), None)
