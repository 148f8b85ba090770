"""Which checkpoints a run keeps."""

from __future__ import annotations

from nextpt.checkpoint.manifest import ListedCheckpoint

# Nothing is removed unless so many of those that stay have just been read and their hashes agree.
VERIFIED = 2


def retained(
    listed: list[ListedCheckpoint], last: int | None, every: int | None, best: int | None
) -> list[ListedCheckpoint]:
    """Those to keep, newest first. listed: newest first.

    last: so many of the newest one's line and as many of all; None keeps everything. Both, because
    a rollback must neither lose the checkpoint it went back to, nor take the abandoned ones away at
    once. every: those of each step that this divides, for ever. best: so many with the lowest
    validation loss on the line; of equal ones the older, which is nearer to the weights that were
    measured.
    """
    if last is None or not listed:
        return listed
    line = [one for one in listed if listed[0].manifest.descends_from(one.manifest)]
    measured = [one for one in reversed(line) if one.manifest.loss is not None]
    chosen = {id(one) for one in listed[:last] + line[:last]}
    chosen |= {id(one) for one in sorted(measured, key=lambda one: one.manifest.loss)[: best or 0]}
    return [
        one for one in listed if id(one) in chosen or (every and one.manifest.step % every == 0)
    ]
