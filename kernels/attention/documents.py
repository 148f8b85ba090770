"""Document masks: packed documents, packed sequences and left padding, for every implementation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels.attention import block_mask
from kernels.attention.intervals import Intervals, Slices, of_documents, of_lengths, of_padding

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class Packing(ABC):
    """Parts of rows that do not see each other; built once per batch and shared by all layers."""

    def __init__(self) -> None:
        # By form and window, for the slices of the last call: layers differ in their windows only.
        self._kept: dict[tuple[str, int | None], tuple[Slices, Any]] = {}

    @abstractmethod
    def check(self, rows: int, slices: Slices) -> None:
        """Raise ValueError where it does not describe `rows` rows with these slices."""

    @abstractmethod
    def cu_seqlens(self, slices: Slices) -> tuple[Tensor, Tensor]:
        """Return the starts of the parts among the queries and among the keys.

        Queries and keys of all rows are counted through, and end together in every row.

        Returns:
            int32 [parts + 1] twice: starts, then the totals; parts may be empty.
        """

    @abstractmethod
    def _compute_intervals(self, slices: Slices, window: int | None) -> Intervals: ...

    def _keep(self, form: str, slices: Slices, window: int | None, build: Callable[[], Any]) -> Any:
        """Return what further calls with the same slices return too; it is built once."""
        kept = self._kept.get((form, window))
        if kept is None or kept[0] != slices:
            kept = self._kept[form, window] = slices, build()
        return kept[1]

    def intervals(self, slices: Slices, window: int | None) -> Intervals:
        """Return the keys that every query sees."""

        def build() -> Intervals:
            return self._compute_intervals(slices, window)

        intervals: Intervals = self._keep("intervals", slices, window, build)
        return intervals

    def mask(self, slices: Slices, window: int | None) -> Tensor:
        """Return the boolean mask [B, 1, Sq, Sk], True where a query sees a key."""

        def build() -> Tensor:
            return self.intervals(slices, window).mask()

        mask: Tensor = self._keep("mask", slices, window, build)
        return mask

    def block_mask(self, slices: Slices, window: int | None) -> BlockMask:
        """Return FlexAttention's mask."""

        def build() -> BlockMask:
            return block_mask.build(self.intervals(slices, window))

        mask: BlockMask = self._keep("block mask", slices, window, build)
        return mask


class PackedDocuments(Packing):
    """Documents packed in rows; a query sees keys of its own document only.

    Every token sees itself, padding too, so that no row of the mask of whole rows is empty. The
    ids describe the whole rows where queries or keys are slices of them.

    Args:
        document_ids: int [B, S]; a document is a run of equal ids in a row.
        cu_seqlens: int32 [documents + 1], starts of the documents in the flattened rows, then
            B * S, which may repeat; a document ends with its row. FlashAttention needs it.
    """

    def __init__(self, document_ids: Tensor, cu_seqlens: Tensor | None = None) -> None:
        if document_ids.dim() != 2:
            raise ValueError(f"document_ids must be [B, S], got shape {tuple(document_ids.shape)}")
        super().__init__()
        self.document_ids = document_ids
        self._cu_seqlens = cu_seqlens

    @property
    def has_cu_seqlens(self) -> bool:
        """Whether the starts of the documents are known, and not their ids alone."""
        return self._cu_seqlens is not None

    def check(self, rows: int, slices: Slices) -> None:
        """Raise ValueError where the slices are not within the rows."""
        length = self.document_ids.shape[1]
        ends = slices.query_offset + slices.queries, slices.key_offset + slices.keys
        starts = slices.query_offset, slices.key_offset
        if self.document_ids.shape[0] != rows or max(ends) > length or min(starts) < 0:
            raise ValueError(
                f"document_ids {tuple(self.document_ids.shape)} do not fit {rows} rows with"
                f" queries at {starts[0]}..{ends[0]} and keys at {starts[1]}..{ends[1]}"
            )

    def _compute_intervals(self, slices: Slices, window: int | None) -> Intervals:
        return of_documents(self.document_ids, slices, window)

    def cu_seqlens(self, slices: Slices) -> tuple[Tensor, Tensor]:
        """Return the starts of the documents, or of what the slices hold of them."""
        if self._cu_seqlens is None:
            raise ValueError("the starts of the documents (cu_seqlens) are not known")
        return (
            self._starts(self._cu_seqlens, slices.query_offset, slices.queries),
            self._starts(self._cu_seqlens, slices.key_offset, slices.keys),
        )

    def _starts(self, cu_seqlens: Tensor, offset: int, length: int) -> Tensor:
        whole = self.document_ids.shape[1]
        if (offset, length) == (0, whole):
            return cu_seqlens
        row = torch.div(cu_seqlens, whole, rounding_mode="floor")
        return row * length + (cu_seqlens - row * whole - offset).clamp(0, length)


class PackedSequences(Packing):
    """Sequences one after another in a single row; queries and keys have lengths of their own.

    Args:
        cu_queries: int32 [sequences + 1], starts among the queries and the total; sequences may be
            empty, and totals may repeat.
        cu_keys: the same among the keys.
        queries: number of queries.
        keys: number of keys.
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
        super().__init__()
        self._cu = cu_queries, cu_keys
        self._slices = Slices.of(queries, keys)

    def check(self, rows: int, slices: Slices) -> None:
        """Raise ValueError for several rows, for other lengths and for offsets."""
        if rows != 1 or slices != self._slices:
            raise ValueError(
                f"packed sequences of {self._slices.queries} queries and {self._slices.keys} keys"
                f" do not fit {rows} rows of {slices.queries} queries and {slices.keys} keys; they"
                " take no offsets, since each sequence's queries end with its keys"
            )

    def _compute_intervals(self, slices: Slices, window: int | None) -> Intervals:
        return of_lengths(*self._cu, slices.queries, slices.keys, window)

    def cu_seqlens(self, slices: Slices) -> tuple[Tensor, Tensor]:
        """Return the starts as they were given."""
        return self._cu


class LeftPadded(Packing):
    """Texts of unlike length that end together: the padding before each is a document of its own.

    Args:
        padding: int [B], positions before each row's text.
    """

    def __init__(self, padding: Tensor) -> None:
        if padding.dim() != 1:
            raise ValueError(f"padding must be [B], got shape {tuple(padding.shape)}")
        super().__init__()
        self.padding = padding.to(torch.int32)

    def check(self, rows: int, slices: Slices) -> None:
        """Raise ValueError for another number of rows."""
        if self.padding.shape[0] != rows:
            raise ValueError(f"padding of {self.padding.shape[0]} rows does not fit {rows} rows")

    def _compute_intervals(self, slices: Slices, window: int | None) -> Intervals:
        return of_padding(self.padding, slices, window)

    def cu_seqlens(self, slices: Slices) -> tuple[Tensor, Tensor]:
        """Return int32 [2 B + 1] twice: per row its padding, then its text."""

        def starts(offset: int, length: int) -> Tensor:
            padding = (self.padding - offset).clamp(0, length)
            lengths = torch.stack((padding, length - padding), dim=1).flatten()
            return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))

        return (
            starts(slices.query_offset, slices.queries),
            starts(slices.key_offset, slices.keys),
        )
