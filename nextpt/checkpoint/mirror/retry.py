"""Calls to an object store: a timeout for stores that hang, retries with exponential backoff."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, wait
from typing import TypeVar

from tenacity import RetryCallState, Retrying, stop_after_attempt

from nextpt.base.errors import UserError
from nextpt.base.stores import is_refusal
from nextpt.checkpoint.errors import DamagedError, UnsupportedVersionError

T = TypeVar("T")
INITIAL_BACKOFF, MAX_BACKOFF = 1.0, 60.0  # seconds
MAX_ATTEMPTS = 5  # at a start, where a user may be waiting
# Seconds without an answer or a block. None of pyarrow's clients gives up on a connection that
# hangs (Linux). A part of S3 is 10 MiB, so a link of 1 Mbit/s is fast enough.
STALL_SECONDS = 120.0
# Not Python's global generator, which tenacity's own waits use: the random state of the training
# process is part of a checkpoint.
_RANDOM = random.Random()


def backoff_seconds(failures: int) -> float:
    """Seconds to wait after consecutive failures: doubled each time, up to half of it left out."""
    longest = min(INITIAL_BACKOFF * 2.0 ** min(failures - 1, 30), MAX_BACKOFF)
    return longest * _RANDOM.uniform(0.5, 1.0)


def run_with_timeout(
    call: Callable[[], T],
    progress: Callable[[], int] = lambda: 0,
    cancelled: Callable[[], bool] = lambda: False,
) -> T:
    """Run a call to a store in a thread of its own, and abandon the thread when it hangs.

    Args:
        call: What to run.
        progress: A number that changes while data flows.
        cancelled: Whether to give up.

    Returns:
        The result of `call`.

    Raises:
        TimeoutError: `progress` did not change for STALL_SECONDS.
        CancelledError: `cancelled` was true.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="store", daemon=True).start()
    last_progress, last_change = progress(), time.monotonic()
    while not outcome.done():
        if cancelled():
            raise CancelledError
        if (now := progress()) != last_progress:
            last_progress, last_change = now, time.monotonic()
        if time.monotonic() - last_change > STALL_SECONDS:
            raise TimeoutError(f"the store cannot be reached: no answer in {STALL_SECONDS:g} s")
        wait([outcome], min(STALL_SECONDS, 0.2))
    return outcome.result()


def retry_call(call: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
    """Run a call to a store, again with backoff when it fails, at most MAX_ATTEMPTS times.

    Refusals, hangs and user errors are not retried. Damaged data is read twice, because an answer
    that is cut short need not look like an error.

    Args:
        call: What to run.
        progress: See `run_with_timeout`.

    Returns:
        The result of `call`.

    Raises:
        Exception: What the last attempt raised.
    """
    retrying = Retrying(
        stop=stop_after_attempt(MAX_ATTEMPTS),
        wait=lambda state: backoff_seconds(state.attempt_number),
        retry=_may_succeed_later,
        reraise=True,
    )
    result: T = retrying(run_with_timeout, call, progress)
    return result


def _may_succeed_later(state: RetryCallState) -> bool:
    error = state.outcome.exception() if state.outcome else None
    if not isinstance(error, Exception):
        return False
    if isinstance(error, DamagedError):
        return state.attempt_number == 1
    final = isinstance(error, (UserError, UnsupportedVersionError, TimeoutError))
    return not final and not is_refusal(error)
