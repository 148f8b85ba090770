"""A micro-batch: fixed shapes, everything the model and the objective need. B rows, T inputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from data_prep.format import PADDING

IGNORE_INDEX = -100  # torch's own default for targets that are not predicted


@dataclass(frozen=True)
class Batch:
    """tokens, targets (IGNORE_INDEX: none), position_ids: int64 [B, T]; document_ids: int32 [B, T], padding -1.

    token_weights: fp32 [B, T], 0 where ignored. target_bytes: int64 [B, T], UTF-8 bytes of each target, 0 for ends of
    documents and ignored ones. domain_ids: int64 [B]. Positions start at 0 in every segment of a row.
    """

    tokens: Tensor
    targets: Tensor
    position_ids: Tensor
    document_ids: Tensor
    token_weights: Tensor
    target_bytes: Tensor
    domain_ids: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; from pinned memory the copies do not block."""
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


    def pinned(self) -> Batch:
        """The batch in page-locked memory."""
        return Batch(**{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})


@dataclass(frozen=True)
class Row:
    """One packed sequence as stored (data_prep.format). tokens: [T + 1]. token_weights: fp32 [T + 1] or None."""

    tokens: np.ndarray
    doc_lens: np.ndarray
    doc_flags: np.ndarray
    domain: int
    token_weights: np.ndarray | None = None


def collate(rows: Iterable[Row], token_bytes: np.ndarray, domain_weights: np.ndarray) -> Batch:
    """Stack rows. token_bytes: [V]. domain_weights: fp32 [domains], the loss weight of each domain's tokens.

    A target counts when it belongs to the segment of its input; the first token of a segment is never predicted.
    """
    rows = list(rows)
    tokens = np.stack([row.tokens for row in rows]).astype(np.int64)
    inputs, following = tokens[:, :-1], tokens[:, 1:]
    document_ids, position_ids = (np.stack(parts) for parts in zip(*(_segments(row) for row in rows), strict=True))
    valid = (document_ids[:, :-1] == document_ids[:, 1:]) & (document_ids[:, :-1] >= 0)
    domains = np.array([row.domain for row in rows], dtype=np.int64)
    weights = valid * domain_weights[domains].astype(np.float32)[:, None]
    for i, row in enumerate(rows):
        if row.token_weights is not None:
            weights[i] *= row.token_weights[1:]
    return Batch(
        tokens=torch.from_numpy(np.ascontiguousarray(inputs)),
        targets=torch.from_numpy(np.where(valid, following, IGNORE_INDEX)),
        position_ids=torch.from_numpy(np.ascontiguousarray(position_ids[:, :-1])),
        document_ids=torch.from_numpy(np.ascontiguousarray(document_ids[:, :-1])),
        token_weights=torch.from_numpy(weights.astype(np.float32)),
        target_bytes=torch.from_numpy(token_bytes[following].astype(np.int64) * valid),
        domain_ids=torch.from_numpy(domains),
    )


def _segments(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """(document ids int32 [T + 1], positions int64 [T + 1]) of a row."""
    lengths = row.doc_lens.astype(np.int64)
    ids = np.where(row.doc_flags & PADDING, -1, np.arange(len(lengths))).astype(np.int32)
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.repeat(ids, lengths), np.arange(len(starts)) - starts
