"""Which tokens of a packed batch may see each other."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from kernels.attention.intervals import Intervals, of_documents, of_lengths, of_padding


class Packing(ABC):
    """Parts of rows that do not see each other; made once per batch and shared by all layers.

    shape: (rows, queries, keys).
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self._intervals: dict[int | None, Intervals] = {}
        self._masks: dict[int | None, Tensor] = {}

    @abstractmethod
    def _find(self, window: int | None) -> Intervals: ...

    @abstractmethod
    def cu_seqlens(self) -> tuple[Tensor, Tensor]:
        """int32 starts of the parts in the flattened queries and keys, then the totals up to a constant size."""

    def intervals(self, window: int | None) -> Intervals:
        """What every query may see; cached per window."""
        if window not in self._intervals:
            self._intervals[window] = self._find(window)
        return self._intervals[window]

    def mask(self, window: int | None) -> Tensor:
        """Boolean [B, 1, Sq, Sk], True where query row may see key column; cached per window."""
        if window not in self._masks:
            self._masks[window] = self.intervals(window).mask()
        return self._masks[window]


class PackedDocuments(Packing):
    """Documents of a batch of packed rows.

    document_ids: int [B, S]. A document is a run of equal ids in a row; a query sees keys of its
    own run only. Every token sees itself, padding too, so that no row of the mask is empty and
    nothing turns NaN.
    """

    def __init__(self, document_ids: Tensor) -> None:
        super().__init__((*document_ids.shape, document_ids.shape[1]))
        self.document_ids = document_ids

    @classmethod
    def from_document_ids(cls, document_ids: Tensor) -> PackedDocuments:
        """document_ids: int [B, S]; ids of neighbouring documents in a row must differ."""
        if document_ids.dim() != 2:
            raise ValueError(f"document_ids must be [B, S], got shape {tuple(document_ids.shape)}")
        return cls(document_ids)

    def _find(self, window: int | None) -> Intervals:
        return of_documents(self.document_ids, window)

    def cu_seqlens(self) -> tuple[Tensor, Tensor]:
        """Twice int32 [B * S + 1].

        The size does not depend on the documents, so nothing has to be read on the host.
        """
        ids = self.document_ids
        starts = torch.ones_like(ids, dtype=torch.bool)
        starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
        flat = starts.flatten()
        total = flat.numel()
        # All others land on the last place
        places = torch.where(flat, torch.cumsum(flat, 0) - 1, total)
        out = torch.full((total + 1,), total, dtype=torch.int32, device=ids.device)
        index = torch.arange(total, dtype=torch.int32, device=ids.device)
        out.scatter_(0, places, torch.where(flat, index, total).to(torch.int32))
        return out, out


class PackedSequences(Packing):
    """Sequences one after another in a single row, as `cu_seqlens` says.

    Queries and keys may have lengths of their own.

    cu_queries, cu_keys: int32 [sequences + 1], starts and the total; sequences may be empty, and
    totals may repeat.
    """

    def __init__(self, cu_queries: Tensor, cu_keys: Tensor, queries: int, keys: int) -> None:
        for cu in (cu_queries, cu_keys):
            if (
                cu.dim() != 1
                or cu.dtype != torch.int32
                or cu.shape != cu_queries.shape
                or cu.shape[0] < 2
            ):
                raise ValueError(
                    "cu_seqlens must be int32 [sequences + 1], alike for queries and keys; got"
                    f" {tuple(cu_queries.shape)} {cu_queries.dtype} and {tuple(cu_keys.shape)}"
                    f" {cu_keys.dtype}"
                )
        super().__init__((1, queries, keys))
        self._cu = cu_queries, cu_keys

    def _find(self, window: int | None) -> Intervals:
        return of_lengths(*self._cu, *self.shape[1:], window)

    def cu_seqlens(self) -> tuple[Tensor, Tensor]:
        return self._cu


class LeftPadded(Packing):
    """Texts of unlike length that end together, with a key-value cache: the padding before each is a document of its own.

    padding: int [B], columns before each row's text; below `keys`. The queries are the last
    `queries` of the keys.
    """

    def __init__(self, padding: Tensor, queries: int, keys: int) -> None:
        if padding.dim() != 1 or queries > keys:
            raise ValueError(
                f"padding must be [B] and queries at most keys; got {tuple(padding.shape)},"
                f" {queries} and {keys}"
            )
        super().__init__((padding.shape[0], queries, keys))
        self.padding = padding.to(torch.int32)

    def _find(self, window: int | None) -> Intervals:
        return of_padding(self.padding, *self.shape[1:], window)

    def cu_seqlens(self) -> tuple[Tensor, Tensor]:
        """Twice int32 [2 B + 1]: per row its padding, then its text.

        The padding of most rows has no query.
        """
        rows, queries, keys = self.shape

        def starts(padding: Tensor, length: int) -> Tensor:
            lengths = torch.stack((padding, length - padding), dim=1).flatten()
            return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))

        return starts((self.padding - (keys - queries)).clamp_min(0), queries), starts(
            self.padding, keys
        )


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Boolean [queries, keys], aligned bottom-right: the last query sees the last key. window counts keys, itself too."""
    distance = torch.arange(keys - queries, keys, device=device).unsqueeze(1) - torch.arange(
        keys, device=device
    )
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)
