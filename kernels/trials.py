"""Trials of implementations: is one right, and how fast is it in a run's own shapes?"""

from __future__ import annotations

import importlib
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch

SECONDS = 0.2  # for which a job is repeated, at least three times


class Trial(NamedTuple):
    """What came of an implementation.

    Attributes:
        name: of the implementation.
        milliseconds: of a micro-batch, forward and backward; None where it was not timed.
        error: largest error beside the reference, relative to the largest value, if it ran.
        reason: why it must not be taken, or None.
    """

    name: str
    milliseconds: float | None = None
    error: float | None = None
    reason: str | None = None


class Shape(Protocol):
    """What an operator has to compute in a run."""

    def try_candidate(self, name: str, function: Any, device: torch.device) -> Trial:
        """Compare an implementation with the reference, then time it. Raises nothing."""


def judge(
    name: str, error: Callable[[], float], tolerance: float, milliseconds: Callable[[], float]
) -> Trial:
    """Find an implementation's error and, where it is right, its time. Raises nothing.

    Args:
        name: of the implementation.
        error: computes the largest error beside the reference, relative to the largest value.
        tolerance: from which on it is wrong; NaN is.
        milliseconds: measures the time.
    """
    try:
        largest = error()
        if not largest < tolerance:
            known = largest if math.isfinite(largest) else None
            return Trial(name, None, known, f"its results are off by {largest:.2g}")
        return Trial(name, milliseconds(), largest)
    except Exception as failure:  # whatever the compiler or the driver raises
        return Trial(name, reason=describe_failure(failure))


def quickest(trials: Iterable[Trial]) -> str | None:
    """Return the name of the quickest implementation that may be taken, if there is one."""
    times = {
        t.name: t.milliseconds for t in trials if t.reason is None and t.milliseconds is not None
    }
    return min(times, key=times.__getitem__) if times else None


def median_milliseconds(
    job: Callable[[], object], device: torch.device, seconds: float = SECONDS
) -> float:
    """Return the median time of a job, which runs twice before, since it may compile."""

    def timed() -> float:
        start = time.perf_counter()
        job()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    timed()
    timed()
    start, times = time.perf_counter(), [timed() for _ in range(3)]
    while time.perf_counter() - start < seconds:
        times.append(timed())
    return 1000 * statistics.median(times)


def describe_failure(failure: Exception) -> str:
    """Return an exception as a phrase of one line."""
    message = str(failure).splitlines()[0] if str(failure) else ""
    return f"it fails: {type(failure).__name__}: {message}"


class Connection(Protocol):
    """The end of a pipe that a child process writes to."""

    def send(self, value: object, /) -> None:
        """Send a value."""


def try_in_turn(
    connection: Connection, candidates: Mapping[str, str], shape: Shape, device: str
) -> None:
    """Try candidates and send each `Trial` as it ends; runs in a child process, which may crash.

    Args:
        connection: where to send.
        candidates: name -> function, as "module:name".
        shape: what they have to compute.
        device: torch device.
    """
    for name, path in candidates.items():
        module, _, function = path.partition(":")
        candidate = getattr(importlib.import_module(module), function)
        connection.send(shape.try_candidate(name, candidate, torch.device(device)))
