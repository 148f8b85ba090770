"""Trials of attention: is an implementation right, and how fast is it in a run's own shapes?"""

from __future__ import annotations

import importlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kernels.attention import PackedDocuments
from kernels.attention.call import AttentionCall
from kernels.attention.comparison import TOLERANCE, Attend, describe_failure, largest_error
from kernels.attention.intervals import Slices

SECONDS = 0.2  # of one implementation and window; at least three times in all


@dataclass(frozen=True)
class AttentionShape:
    """What the attention of a micro-batch has to compute.

    Attributes:
        rows: sequences, B.
        length: tokens of each, T.
        heads: query heads.
        kv_heads: key heads.
        head_dim: width of a head.
        dtype: name of the torch dtype of queries, keys and values.
        windows: (window, number of layers that have it); None for all keys.
        sinks: whether a logit per head takes part in the softmax.
        documents: starts of the documents in the flattened rows, then B T, as in a batch.
    """

    rows: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    windows: tuple[tuple[int | None, int], ...]
    sinks: bool
    documents: tuple[int, ...]

    def packed(self, device: torch.device) -> PackedDocuments:
        """Return the documents of the micro-batch."""
        starts = torch.tensor(self.documents, dtype=torch.int32)
        tokens = torch.arange(self.rows * self.length)
        ids = torch.searchsorted(starts, tokens, right=True).to(torch.int32)
        return PackedDocuments(ids.view(self.rows, self.length).to(device), starts.to(device))


class Trial(NamedTuple):
    """What came of an implementation.

    Attributes:
        name: of the implementation.
        milliseconds: of all layers, forward and backward; None where it was not timed.
        error: largest error beside the reference, relative to the largest value, if it ran.
        reason: why it must not be taken, or None.
    """

    name: str
    milliseconds: float | None = None
    error: float | None = None
    reason: str | None = None


def document_lengths(total: int) -> list[int]:
    """Return lengths as of web text: log-normal, median 600 tokens, a few of thousands.

    They are fixed, so that runs compare.
    """
    distribution: Any = torch.distributions.LogNormal(6.4, 1.0)
    drawn = distribution.icdf(torch.linspace(0.02, 0.98, 64)).int()
    lengths: list[int] = []
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()
    while sum(lengths) < total:
        lengths.append(min(int(drawn[order[len(lengths) % 64]]), total - sum(lengths)))
    return lengths


def packed_starts(rows: int, length: int) -> list[int]:
    """Return starts of documents with `document_lengths` in flattened rows, then their total."""
    starts = [0, *itertools.accumulate(document_lengths(length))]
    return [row * length + start for row in range(rows) for start in starts[:-1]] + [rows * length]


def quickest(trials: Iterable[Trial]) -> str | None:
    """Return the name of the quickest implementation that may be taken, if there is one."""
    times = {
        t.name: t.milliseconds for t in trials if t.reason is None and t.milliseconds is not None
    }
    return min(times, key=times.__getitem__) if times else None


def try_attention(
    name: str, attend: Attend, shape: AttentionShape, device: torch.device, seconds: float = SECONDS
) -> Trial:
    """Compare an implementation with the reference, then time it.

    Args:
        name: of the implementation.
        attend: it.
        shape: of the micro-batch.
        device: where to run it.
        seconds: for which each window is repeated.
    """
    dtype: torch.dtype = getattr(torch, shape.dtype)
    errors = []
    try:
        for window, _ in shape.windows:
            error = largest_error(
                attend,
                device,
                dtype,
                window=window,
                sinks=shape.sinks,
                head_dim=shape.head_dim,
                group=shape.heads // shape.kv_heads,
            )
            if not error < TOLERANCE[dtype]:  # NaN is not
                known = error if math.isfinite(error) else None
                return Trial(name, None, known, f"its results are off by {error:.2g}")
            errors.append(error)
        return Trial(name, _milliseconds(attend, shape, device, seconds), max(errors))
    except Exception as failure:  # whatever the compiler or the driver raises
        return Trial(name, reason=describe_failure(failure))


def _milliseconds(
    attend: Attend, shape: AttentionShape, device: torch.device, seconds: float
) -> float:
    """Return the time of all layers of a micro-batch, forward and backward."""
    dtype: torch.dtype = getattr(torch, shape.dtype)
    generator = torch.Generator(device).manual_seed(0)

    def draw(heads: int) -> Tensor:
        size = shape.rows, shape.length, heads, shape.head_dim
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    q, k, v = (draw(heads).requires_grad_() for heads in (shape.heads, *[shape.kv_heads] * 2))
    sinks = torch.zeros(shape.heads, device=device, requires_grad=True) if shape.sinks else None
    inputs = [t for t in (q, k, v, sinks) if t is not None]
    upstream, documents = draw(shape.heads), shape.packed(device)
    slices = Slices.of(shape.length, shape.length)
    total = 0.0
    for window, layers in shape.windows:
        call = AttentionCall(slices, shape.head_dim**-0.5, documents, window, sinks=sinks)

        def step(call: AttentionCall = call) -> None:
            torch.autograd.grad(attend(q, k, v, call).out, inputs, upstream)

        total += layers * _median_seconds(step, device, seconds)
    return 1000 * total


def _median_seconds(job: Callable[[], None], device: torch.device, seconds: float) -> float:
    def timed() -> float:
        start = time.perf_counter()
        job()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    timed()  # compiles
    timed()
    start, times = time.perf_counter(), [timed() for _ in range(3)]
    while time.perf_counter() - start < seconds:
        times.append(timed())
    return statistics.median(times)


class Connection(Protocol):
    """The end of a pipe that a child process writes to."""

    def send(self, value: object, /) -> None:
        """Send a value."""


def try_in_turn(
    connection: Connection, candidates: Mapping[str, str], shape: AttentionShape, device: str
) -> None:
    """Try candidates and send each `Trial` as it ends; runs in a child process, which may crash.

    Args:
        connection: where to send.
        candidates: name -> function, as "module:name".
        shape: of the micro-batch.
        device: torch device.
    """
    for name, path in candidates.items():
        module, _, function = path.partition(":")
        attend = getattr(importlib.import_module(module), function)
        connection.send(try_attention(name, attend, shape, torch.device(device)))


def function_paths() -> Mapping[str, str]:
    """Return the implementations of attention by name, as "module:name"."""
    from kernels.attention.interface import FUNCTIONS

    return {name: f"{f.__module__}:{f.__name__}" for name, f in FUNCTIONS.items()}
