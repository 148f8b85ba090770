"""Small real checkpoints, written by ranks that are threads, and forged manifests."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from nextpt.base.collective import RankGroup
from nextpt.base.files import canonical_json
from nextpt.checkpoint.commit import save
from nextpt.checkpoint.format import Checkpoint
from nextpt.checkpoint.manifest import describe, read_manifest, write_manifest
from nextpt.checkpoint.state import Fragment

KINDS = ("weight", "exp_avg", "exp_avg_sq")
SHAPES = {"a": (5, 3), "b": (4,), "c": (2, 3, 4)}


class State:
    """A ShardedState: two uneven fragments of every parameter; the ranks take every n-th."""

    def __init__(self, value: float = 1.0, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size
        self.values = {
            (n, k): torch.arange(math.prod(s), dtype=torch.float32) * value + i
            for i, (n, s) in enumerate(SHAPES.items())
            for k in KINDS
        }

    def fragments(self) -> Iterator[Fragment]:
        number = 0
        for (name, kind), flat in self.values.items():
            cut = flat.numel() * 2 // 5 + 1
            for start, stop in ((0, cut), (cut, flat.numel())):
                if number % self.world_size == self.rank:
                    yield Fragment(name, kind, SHAPES[name], start, stop, flat[start:stop])
                number += 1

    def scalars(self) -> dict[str, float]:
        return {"optimizer_updates": 3.0}

    def state_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        return {name: dict.fromkeys(KINDS, shape) for name, shape in SHAPES.items()}


def holds(checkpoint: Checkpoint, value: float) -> bool:
    """Whether every tensor of a checkpoint is that of State(value)."""
    return all(
        torch.equal(checkpoint.read(n, k, 0, t.numel()), t)
        for (n, k), t in State(value).values.items()
    )


class Board:
    """Exchange of JSON between threads, in any number of groups.

    Args:
        world_size: Number of threads.
        in_turn: One thread runs at a time, from exchange to exchange.
    """

    def __init__(self, world_size: int, in_turn: bool) -> None:
        self.world_size, self.in_turn = world_size, in_turn
        self.changed = threading.Condition()
        # (group, number of the exchange) -> rank -> JSON
        self.texts: dict[tuple[int, int], dict[int, str]] = {}
        self.running = list(range(world_size))  # the first runs
        self.broken = False

    def wait(self, ready: Callable[[], bool]) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.broken or ready(), 300) or self.broken:
                raise Gone

    def wait_for_turn(self, rank: int) -> None:
        if self.in_turn:
            self.wait(lambda: self.running[0] == rank)

    def end_turn(self, rank: int, for_good: bool = False) -> None:
        with self.changed:
            self.running.remove(rank)
            self.running += [] if for_good else [rank]
            self.changed.notify_all()

    def fail(self) -> None:
        with self.changed:
            self.broken = True
            self.changed.notify_all()


class Gone(Exception):
    """Another rank has ended."""


class ThreadRanks(RankGroup):
    """A rank in a thread of this process; it exchanges JSON as a real rank does."""

    def __init__(self, rank: int, world_size: int, board: Board, group: int = 0) -> None:
        self.rank = rank
        self.world_size = world_size
        self._board = board
        self._number_of_group = group
        self._exchanges = 0

    def duplicate(self) -> ThreadRanks:
        return ThreadRanks(self.rank, self.world_size, self._board, self._number_of_group + 1)

    def all_gather(self, value: Any) -> list[Any]:
        board = self._board
        self._exchanges += 1
        with board.changed:
            texts = board.texts.setdefault((self._number_of_group, self._exchanges), {})
            texts[self.rank] = json.dumps(value)
            board.changed.notify_all()
        if board.in_turn:
            board.end_turn(self.rank)
        board.wait(lambda: len(texts) == self.world_size)
        board.wait_for_turn(self.rank)
        return [json.loads(texts[rank]) for rank in range(self.world_size)]

    def any_of(self, *flags: bool) -> list[bool]:
        return [any(votes) for votes in zip(*self.all_gather(flags), strict=True)]


def on_ranks(
    world_size: int, action: Callable[[RankGroup], Any], in_turn: bool = False
) -> list[Any]:
    """Results of `action` on each rank.

    A rank that raises ends the others, as a dead process does; its error is raised.

    in_turn: Run in a reproducible order. Not for ranks with threads of their own.
    """
    if world_size == 1:
        return [action(RankGroup.world())]
    board = Board(world_size, in_turn)

    def run_rank(rank: int) -> Any:
        try:
            board.wait_for_turn(rank)
            return action(ThreadRanks(rank, world_size, board))
        except BaseException:
            board.fail()
            raise
        finally:
            board.end_turn(rank, for_good=True)

    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(run_rank, rank) for rank in range(world_size)]
    errors = [future.exception() for future in futures]
    for error in sorted((e for e in errors if e), key=lambda e: isinstance(e, Gone)):
        raise error
    return [future.result() for future in futures]


def write(
    root: Path, step: int, value: float = 1.0, world_size: int = 1, lineage: list[list[int]] = ()
) -> Path:
    """Save State(value) as a checkpoint of a step."""
    return on_ranks(
        world_size,
        lambda group: save(
            root,
            State(value, group.rank, group.world_size),
            {"step": step, "config": {}},
            {"torch": "x"},
            group,
            lineage,
        ),
    )[0].folder


def forge(folder: Path, **changes: Any) -> None:
    """Make the manifest agree with the files as they are now, as an attacker would.

    Args:
        folder: The checkpoint.
        changes: Keys of the manifest to change.
    """
    old = read_manifest(folder)
    files = {name: describe(folder / name) for name in old.files}
    write_manifest(folder, old.model_validate(old.model_dump() | {"files": files} | changes))


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """Change the value of a JSON file in place."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(canonical_json(value))


def as_version_1(folder: Path) -> None:
    """Rewrite a checkpoint's manifest and state.json as the first format version wrote them."""
    edit(folder / "state.json", lambda state: state.pop("optimizer_state"))
    names = read_manifest(folder).files
    files = {name: describe(folder / name) for name in names}
    (folder / "manifest.json").write_text(canonical_json({"format_version": 1, "files": files}))
