"""Doing something on every rank so that a failure of one is heard by all, instead of leaving them waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from nextpt.checkpoint.ranks import Ranks
from nextpt.errors import UserError

T = TypeVar("T")


def on_all(ranks: Ranks, action: Callable[[], T]) -> T:
    """Run on every rank; when one fails all raise the message of the first, and one of them prints it. Collective.

    Costs one exchange of four bytes between hosts while nothing fails; no device waits for it.
    """
    result, failure = None, None
    try:
        result = action()
    except UserError as error:
        failure = str(error)
    except OSError as error:
        failure = f"{error.filename}: {error.strerror}; is the disk full or the folder not writable?"
    if ranks.any(failure is not None):
        rank, message = next((r, m) for r, m in enumerate(ranks.gather(failure)) if m)
        raise UserError(message if rank == 0 else f"rank {rank}: {message}")
    return result  # type: ignore[return-value]


def on_first(ranks: Ranks, action: Callable[[], None]) -> None:
    """Run on rank 0; all ranks raise what it raised. Collective."""
    on_all(ranks, action if ranks.rank == 0 else lambda: None)
