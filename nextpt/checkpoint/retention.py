"""Retention: which checkpoints of a run are kept."""

from __future__ import annotations

import math

from nextpt.checkpoint.manifest import ListedCheckpoint, lineage_of

# Nothing is removed unless this many of the kept ones were just read and their hashes agree.
VERIFIED_BEFORE_REMOVAL = 2


def retained(
    checkpoints: list[ListedCheckpoint], last: int | None, every: int | None, best: int | None
) -> list[ListedCheckpoint]:
    """Select the checkpoints to keep.

    Args:
        checkpoints: All of them, newest first.
        last: Keep this many of the newest one's lineage, and this many of all. None keeps
            everything. Both, because a rollback must not lose the checkpoint that it went back to,
            nor remove the abandoned ones at once.
        every: Keep those whose step is a multiple of this.
        best: Keep this many of the lineage with the lowest validation loss; of equal ones the
            older, which is nearer to the weights that were measured.

    Returns:
        Those to keep, newest first.
    """
    if last is None or not checkpoints:
        return checkpoints
    lineage = lineage_of(checkpoints)
    measured = [c for c in reversed(lineage) if c.manifest.loss is not None]
    measured.sort(key=lambda c: math.inf if c.manifest.loss is None else c.manifest.loss)
    kept = {id(c) for c in checkpoints[:last] + lineage[:last] + measured[: best or 0]}
    return [c for c in checkpoints if id(c) in kept or (every and c.manifest.step % every == 0)]
