"""Intervals of keys that queries see: the one form of every mask.

Causality, offsets, packed documents, sliding windows and every combination of them let a query see
the keys first..last, and both ends grow with the query. So a kernel needs two numbers per query
and, for the gradients of keys, two per key; a block of keys needs no mask for a tile of queries
when it lies between the last query's first and the first query's last.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


class Slices(NamedTuple):
    """Slices of a sequence that the queries and the keys of a call are.

    Attributes:
        query_offset: position of the first query in the sequence.
        queries: number of queries.
        key_offset: position of the first key in the sequence.
        keys: number of keys.
    """

    query_offset: int
    queries: int
    key_offset: int
    keys: int

    @classmethod
    def of(
        cls, queries: int, keys: int, query_offset: int | None = None, key_offset: int = 0
    ) -> Slices:
        """Build slices; unless `query_offset` is given, the last query stands at the last key."""
        if query_offset is None:
            query_offset = key_offset + keys - queries
        return cls(query_offset, queries, key_offset, keys)

    @property
    def end_together(self) -> bool:
        """Whether the last query stands at the last key."""
        return self.query_offset + self.queries == self.key_offset + self.keys

    @property
    def see_themselves(self) -> bool:
        """Whether the position of every query is that of a key."""
        last_query, last_key = self.query_offset + self.queries, self.key_offset + self.keys
        return self.key_offset <= self.query_offset and last_query <= last_key

    def query_positions(self, device: torch.device) -> Tensor:
        """Places of the queries counted from the first key, int32 [Sq]; they may be negative."""
        first = self.query_offset - self.key_offset
        return torch.arange(first, first + self.queries, dtype=torch.int32, device=device)


class Intervals(NamedTuple):
    """Keys that queries see, and queries that see keys; int32, R is the rows, or 1 for all alike.

    Attributes:
        first: [R, Sq], first key that a query sees.
        last: [R, Sq], last key that it sees; first - 1 where it sees none.
        query_start: [R, Sk], first query that sees at least up to a key.
        query_stop: [R, Sk], one more than the last query that starts at a key or before it: a key
            is seen by query_start..query_stop - 1.
    """

    first: Tensor
    last: Tensor
    query_start: Tensor
    query_stop: Tensor

    @classmethod
    def between(cls, first: Tensor, last: Tensor, keys: int) -> Intervals:
        """Build from the ends [R, Sq], both of which grow; they are brought among the keys."""
        first = first.clamp(0, keys)
        last = torch.maximum(last.clamp(max=keys - 1), first - 1)
        positions = torch.arange(keys, dtype=torch.int32, device=first.device)
        positions = positions.expand(first.shape[0], -1).contiguous()
        start = torch.searchsorted(last.contiguous(), positions, out_int32=True)
        stop = torch.searchsorted(first.contiguous(), positions, right=True, out_int32=True)
        first, last = (end.to(torch.int32).contiguous() for end in (first, last))
        return cls(first, last, start, stop)

    def mask(self) -> Tensor:
        """Boolean [R, 1, Sq, Sk], True where a query sees a key."""
        keys = torch.arange(self.query_start.shape[1], device=self.first.device)
        return ((keys >= self.first.unsqueeze(2)) & (keys <= self.last.unsqueeze(2))).unsqueeze(1)


def causal(slices: Slices, window: int | None, device: torch.device) -> Intervals:
    """Intervals of one row: keys up to the query's position.

    Args:
        slices: positions of the queries and the keys.
        window: keys that a query sees, its own position included; None for all.
        device: of the result.
    """
    last = slices.query_positions(device).unsqueeze(0)
    first = torch.zeros_like(last) if window is None else last - window + 1
    return Intervals.between(first, last, slices.keys)


def cached_causal(slices: Slices, window: int | None, device: torch.device) -> Intervals:
    """Return `causal`, of the last calls once: all layers of a model ask for the same."""
    if is_in_torch_dispatch_mode() or torch.compiler.is_compiling():
        return causal(slices, window, device)  # what a mode makes must not outlive it
    return _cached_causal(slices, window, device)


@functools.lru_cache(maxsize=8)
def _cached_causal(slices: Slices, window: int | None, device: torch.device) -> Intervals:
    with torch.inference_mode(mode=False):  # a later call may save them for its backward pass
        return causal(slices, window, device)


def of_documents(document_ids: Tensor, slices: Slices, window: int | None) -> Intervals:
    """Intervals where a query sees keys of its own document only, a run of equal ids.

    Args:
        document_ids: int [B, S] of the whole rows, from which the slices are taken.
        slices: positions of the queries and the keys in the rows.
        window: as in `causal`.
    """
    positions = torch.arange(document_ids.shape[1], dtype=torch.int32, device=document_ids.device)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    start = torch.where(begins, positions, 0).cummax(1).values
    start = start[:, slices.query_offset : slices.query_offset + slices.queries]
    return _from_starts(start, slices, window)


def of_padding(padding: Tensor, slices: Slices, window: int | None) -> Intervals:
    """Intervals where the first `padding` [B] positions of each row are a document of their own."""
    positions = slices.query_positions(padding.device) + slices.key_offset
    start = torch.where(positions < padding.unsqueeze(1), 0, padding.unsqueeze(1))
    return _from_starts(start, slices, window)


def _from_starts(start: Tensor, slices: Slices, window: int | None) -> Intervals:
    """Intervals from the position [B, Sq] at which the document of each query begins."""
    last = slices.query_positions(start.device).expand(start.shape)
    first = start - slices.key_offset
    if window is not None:
        first = torch.maximum(first, last - window + 1)
    return Intervals.between(first, last, slices.keys)


def of_lengths(
    cu_queries: Tensor, cu_keys: Tensor, queries: int, keys: int, window: int | None
) -> Intervals:
    """Intervals of packed sequences, each of which ends with its keys' last.

    Args:
        cu_queries: int32 [sequences + 1], starts of the sequences among the queries, then the
            total; sequences may be empty, and the total may repeat.
        cu_keys: the same among the keys.
        queries: number of queries.
        keys: number of keys.
        window: as in `causal`.
    """
    positions = torch.arange(queries, dtype=torch.int32, device=cu_queries.device)
    sequence = torch.searchsorted(cu_queries, positions, right=True) - 1
    sequence = sequence.clamp(0, cu_queries.shape[0] - 2)
    first = cu_keys[sequence]
    last = cu_keys[sequence + 1] - (cu_queries[sequence + 1] - positions)
    if window is not None:
        first = torch.maximum(first, last - window + 1)
    return Intervals.between(first.unsqueeze(0), last.unsqueeze(0), keys)
