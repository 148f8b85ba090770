"""Which tokens of a packed batch may see each other."""

from __future__ import annotations

import torch
from torch import Tensor


class PackedDocuments:
    """Documents of a batch of packed rows; made once per batch and shared by all layers.

    document_ids: int [B, S]. A document is a run of equal ids in a row; a query sees keys of its own run only.
    Every token sees itself, padding too, so that no row of the mask is empty and nothing turns NaN.
    """

    def __init__(self, document_ids: Tensor) -> None:
        self.document_ids = document_ids
        self._masks: dict[int | None, Tensor] = {}

    @classmethod
    def from_document_ids(cls, document_ids: Tensor) -> PackedDocuments:
        """document_ids: int [B, S]; ids of neighbouring documents in a row must differ."""
        if document_ids.dim() != 2:
            raise ValueError(f"document_ids must be [B, S], got shape {tuple(document_ids.shape)}")
        return cls(document_ids)

    def mask(self, window: int | None) -> Tensor:
        """Boolean [B, 1, S, S], True where query row may see key column; cached per window."""
        if window not in self._masks:
            same = self.document_ids.unsqueeze(2) == self.document_ids.unsqueeze(1)
            self._masks[window] = (same & causal_mask(same.shape[1], same.shape[2], window, same.device)).unsqueeze(1)
        return self._masks[window]

    def cu_seqlens(self) -> Tensor:
        """int32 [B * S + 1]: starts of all documents in the flattened batch, then B * S up to the constant size.

        The size does not depend on the documents, so nothing has to be read on the host.
        """
        ids = self.document_ids
        starts = torch.ones_like(ids, dtype=torch.bool)
        starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
        flat = starts.flatten()
        total = flat.numel()
        places = torch.where(flat, torch.cumsum(flat, 0) - 1, total)  # all others land on the last place
        out = torch.full((total + 1,), total, dtype=torch.int32, device=ids.device)
        index = torch.arange(total, dtype=torch.int32, device=ids.device)
        out.scatter_(0, places, torch.where(flat, index, total).to(torch.int32))
        return out


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Boolean [queries, keys], aligned bottom-right: the last query sees the last key. window counts keys, itself too."""
    distance = torch.arange(keys - queries, keys, device=device).unsqueeze(1) - torch.arange(keys, device=device)
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)
