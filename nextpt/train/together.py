"""Doing something on every rank so that a failure of one is heard by all, instead of leaving them waiting for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from nextpt.checkpoint.ranks import Ranks
from nextpt.errors import MISTAKE, UserError

T = TypeVar("T")

# What gloo, NCCL and torch's store say when a process at the other end of a connection is gone.
_GONE = re.compile(
    r"connection (was )?(reset|closed|refused)|connection closed by peer|broken pipe|socket"
    r" closed|remote process exited|"
    r"(read|write|send|recv)\w* error .*(reset|pipe|peer)|ncclRemoteError",
    re.IGNORECASE,
)


def on_all(ranks: Ranks, action: Callable[[], T]) -> T:
    """Run on every rank.

    When one fails all raise the message of the first, and one of them prints it. Collective.

    Costs one exchange of a few bytes between hosts while nothing fails; no device waits for it.
    """
    return on_all_or_stop(ranks, action, lambda: False)[0]


def on_all_or_stop(
    ranks: Ranks, action: Callable[[], T], stopping: Callable[[], bool]
) -> tuple[T, bool]:
    """As `on_all`; also whether `stopping` is true on any rank, on which all agree, in the same exchange. Collective."""
    result, failure = None, None
    try:
        result = action()
    except UserError as error:
        failure = [str(error), error.exit_code]
    except OSError as error:
        failure = [
            f"{error.filename}: {error.strerror}; is the disk full or the folder not writable?",
            MISTAKE,
        ]
    failed, stop = ranks.any_of(failure is not None, stopping())
    if failed:
        rank, (message, code) = next((r, f) for r, f in enumerate(ranks.gather(failure)) if f)
        raised = UserError(message if rank == 0 else f"rank {rank}: {message}")
        raised.exit_code = code
        raise raised
    return result, stop  # type: ignore[return-value]


def on_first(ranks: Ranks, action: Callable[[], None]) -> None:
    """Run on rank 0; all ranks raise what it raised. Collective."""
    on_all(ranks, action if ranks.rank == 0 else lambda: None)


def lost_peer(error: BaseException) -> str | None:
    """What a collective said when another rank was gone; None for an error of this rank's own."""
    text = str(error)
    return (
        text.strip().splitlines()[0]
        if isinstance(error, RuntimeError) and _GONE.search(text)
        else None
    )
