"""The checkpoints of one run, as its training sees them: start from one, add to them, let old ones go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nextpt.checkpoint.commit import Saved, choose, intact, on_first, out_of_the_way, save
from nextpt.checkpoint.folders import listing, remove
from nextpt.checkpoint.format import Checkpoint
from nextpt.checkpoint.manifest import read_manifest
from nextpt.checkpoint.ranks import Ranks
from nextpt.checkpoint.retention import kept
from nextpt.checkpoint.state import ShardedState
from nextpt.config import CheckpointSection

# Nothing is removed unless so many of those that stay have just been read and their hashes agree.
VERIFIED = 2


class Keeper:
    """warn: shows a line to the person; rank 0's is the one to listen to. All methods are collective."""

    def __init__(self, root: Path, settings: CheckpointSection, ranks: Ranks, warn: Callable[[str], None]) -> None:
        self.root, self.settings, self.ranks, self.warn = root, settings, ranks, warn
        self._line: list[list[int]] = []

    def start(self) -> Checkpoint | None:
        """What to resume from; see `choose`. Saves will continue its line."""
        found = choose(self.root, self.settings.resume, self.ranks, self.warn, mend=True)
        if found is not None:
            self._line = read_manifest(found.folder).line
        return found

    def save(self, state: ShardedState, extras: dict[str, Any], rng: dict[str, Any], loss: float | None = None) -> Saved:
        """Write a checkpoint; when it is durable, remove those that need not be kept. Raises as `save` of commit.py does."""
        saved = save(self.root, state, extras, rng, self.ranks, self._line, loss)
        self._line = saved.line
        self._retire()
        return saved

    def _retire(self) -> None:
        """Remove what retention does not keep, if at least two of the others prove whole; the new one was read when it was hashed."""
        names, surplus = on_first(self._plan, self.root, self.ranks)
        if not surplus:
            return
        whole = names[:1]
        for name in [*names[1:], *surplus]:
            if len(whole) == VERIFIED:
                break
            problem = intact(self.root / name, self.ranks)
            if problem is None:
                whole.append(name)
            else:
                how = on_first(lambda name=name: out_of_the_way(self.root / name), self.root, self.ranks)
                self.warn(f"warning: checkpoint {self.root / name} is not usable: {problem}{how}")
                surplus = [other for other in surplus if other != name]
        if len(whole) == VERIFIED:
            on_first(lambda: self._remove([name for name in surplus if name not in whole]), self.root, self.ranks)

    def _plan(self) -> tuple[list[str], list[str]]:
        """Names of (those to keep, those to let go), newest first."""
        listed = listing(self.root)[0]
        keep = [one.folder.name for one in kept(listed, self.settings.keep_last, self.settings.keep_every, self.settings.keep_best)]
        return keep, [one.folder.name for one in listed if one.folder.name not in keep]

    def _remove(self, names: list[str]) -> None:
        for name in reversed(names):  # the oldest first
            try:
                remove(self.root / name)
            except OSError as error:  # training need not end for it; the next save tries again
                self.warn(f"warning: checkpoint {self.root / name} is no longer needed and cannot be removed: {error.strerror}")
