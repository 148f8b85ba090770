"""Trial of an implementation of attention in the shapes of a run."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.attention.call import AttentionCall
from kernels.attention.comparison import TOLERANCE, Attend, largest_error
from kernels.attention.documents import PackedDocuments
from kernels.attention.intervals import Slices
from kernels.trials import SECONDS, Trial, judge, median_milliseconds


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
        seconds: for which each window is timed.
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
    seconds: float = SECONDS

    def packed(self, device: torch.device) -> PackedDocuments:
        """Return the documents of the micro-batch."""
        starts = torch.tensor(self.documents, dtype=torch.int32)
        tokens = torch.arange(self.rows * self.length)
        ids = torch.searchsorted(starts, tokens, right=True).to(torch.int32)
        return PackedDocuments(ids.view(self.rows, self.length).to(device), starts.to(device))

    def try_candidate(self, name: str, function: Attend, device: torch.device) -> Trial:
        """Compare an implementation with the reference, then time all layers of a micro-batch."""
        return judge(
            name,
            lambda: self._largest_error(function, device),
            TOLERANCE[getattr(torch, self.dtype)],
            lambda: self._milliseconds(function, device),
        )

    def _largest_error(self, attend: Attend, device: torch.device) -> float:
        errors = [
            largest_error(
                attend,
                device,
                getattr(torch, self.dtype),
                window=window,
                sinks=self.sinks,
                head_dim=self.head_dim,
                group=self.heads // self.kv_heads,
            )
            for window, _ in self.windows
        ]
        return float(torch.tensor(errors).max())  # NaN if one is

    def _milliseconds(self, attend: Attend, device: torch.device) -> float:
        """Return the time of all layers, forward and backward."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        generator = torch.Generator(device).manual_seed(0)

        def draw(heads: int) -> Tensor:
            size = self.rows, self.length, heads, self.head_dim
            return torch.randn(size, generator=generator, device=device, dtype=dtype)

        q, k, v = (draw(heads).requires_grad_() for heads in (self.heads, *[self.kv_heads] * 2))
        sinks = torch.zeros(self.heads, device=device, requires_grad=True) if self.sinks else None
        inputs = [t for t in (q, k, v, sinks) if t is not None]
        upstream, documents = draw(self.heads), self.packed(device)
        slices = Slices.of(self.length, self.length)
        total = 0.0
        for window, layers in self.windows:
            call = AttentionCall(slices, self.head_dim**-0.5, documents, window, sinks=sinks)

            def step(call: AttentionCall = call) -> None:
                torch.autograd.grad(attend(q, k, v, call).out, inputs, upstream)

            total += layers * median_milliseconds(step, device, self.seconds)
        return total


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


def function_paths() -> Mapping[str, str]:
    """Return the implementations of attention by name, as "module:name"."""
    from kernels.attention.interface import FUNCTIONS

    return {name: f"{f.__module__}:{f.__name__}" for name, f in FUNCTIONS.items()}
