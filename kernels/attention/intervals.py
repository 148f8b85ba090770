"""What every query may see, as one interval of keys: the only mask there is.

Causality, alignment of fewer queries than keys, packed documents, sliding windows and every
combination of them let a query see the keys first..last, and both ends grow with the query. So a
kernel needs two numbers per query and, for the gradients of keys, two per key; a block of keys is
whole for a tile of queries when it lies between the last query's first and the first query's last.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Intervals(NamedTuple):
    """int32. first, last [R, Sq]: keys that a query sees, last included.

    None where last = first - 1. query_start, query_stop [R, Sk]: queries that see at least up to a
    key, and those that start at it or before: a key is seen by query_start..query_stop - 1. R is
    the number of rows, or 1 for all alike.
    """

    first: Tensor
    last: Tensor
    query_start: Tensor
    query_stop: Tensor

    @classmethod
    def between(cls, first: Tensor, last: Tensor, keys: int) -> Intervals:
        """From the ends [R, Sq], both growing; `last` is brought to at least first - 1."""
        last = torch.maximum(last, first - 1)
        every = (
            torch.arange(keys, dtype=torch.int32, device=first.device)
            .expand(first.shape[0], -1)
            .contiguous()
        )
        start = torch.searchsorted(last.contiguous(), every, out_int32=True)
        stop = torch.searchsorted(first.contiguous(), every, right=True, out_int32=True)
        return cls(
            first.to(torch.int32).contiguous(), last.to(torch.int32).contiguous(), start, stop
        )

    def mask(self) -> Tensor:
        """Boolean [R, 1, Sq, Sk], True where query row may see key column."""
        keys = torch.arange(self.query_start.shape[1], device=self.first.device)
        return ((keys >= self.first.unsqueeze(2)) & (keys <= self.last.unsqueeze(2))).unsqueeze(1)


def causal(queries: int, keys: int, window: int | None, device: torch.device) -> Intervals:
    """Aligned bottom-right: the last query sees the last key. window counts keys, the query's own too."""
    last = torch.arange(keys - queries, keys, dtype=torch.int32, device=device).unsqueeze(0)
    first = torch.zeros_like(last) if window is None else (last - window + 1).clamp_min(0)
    return Intervals.between(first, last, keys)


def of_documents(document_ids: Tensor, window: int | None) -> Intervals:
    """document_ids [B, S]: a query sees keys of its own run of equal ids."""
    place = torch.arange(
        document_ids.shape[1], dtype=torch.int32, device=document_ids.device
    ).expand(document_ids.shape)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    first = torch.where(begins, place, 0).cummax(1).values
    return Intervals.between(
        first if window is None else torch.maximum(first, place - window + 1),
        place,
        document_ids.shape[1],
    )


def of_padding(padding: Tensor, queries: int, keys: int, window: int | None) -> Intervals:
    """Padding [B]: a query, of the last `queries` places, sees keys from there on, or of the padding where it stands in that."""
    place = torch.arange(keys - queries, keys, dtype=torch.int32, device=padding.device).expand(
        padding.shape[0], -1
    )
    first = torch.where(place < padding.unsqueeze(1), 0, padding.unsqueeze(1))
    return Intervals.between(
        first if window is None else torch.maximum(first, place - window + 1), place, keys
    )


def of_lengths(
    cu_queries: Tensor, cu_keys: Tensor, queries: int, keys: int, window: int | None
) -> Intervals:
    """Packed sequences, query s of which sees keys of sequence s, each aligned bottom-right.

    cu_queries, cu_keys [sequences + 1]: starts, then the totals; empty sequences and padding by the
    totals are fine.
    """
    place = torch.arange(queries, dtype=torch.int32, device=cu_queries.device)
    sequence = torch.searchsorted(cu_queries, place, right=True) - 1
    sequence = sequence.clamp(0, cu_queries.shape[0] - 2)
    first = cu_keys[sequence]
    last = cu_keys[sequence + 1] - (cu_queries[sequence + 1] - place)
    if window is not None:
        first = torch.maximum(first, last - window + 1)
    return Intervals.between(first.unsqueeze(0), last.unsqueeze(0), keys)
