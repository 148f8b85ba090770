"""Metrics as ratios of per-domain sums of nats, tokens and bytes; never means of ratios.

In `nats_per_token`, `perplexity` and `bpb` only text counts: the nats and the number of special
tokens (start and end of document) are left out, the bytes are those of all text, so
bpb = sum(nats) / (ln 2 * sum(bytes)) depends on the text and not on how it was cut into tokens.
`bpb_with_eod` adds the nats of the ends of documents, over the same bytes: what a file that can be
decoded costs. Where a tokenizer changes text, a text token may stand for no bytes and the end of a
document for some (spaces that were stripped).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Metrics:
    """Sums over predicted tokens, and the metrics that are ratios of them.

    Attributes:
        tokens: Text tokens.
        bytes: UTF-8 bytes that they stand for.
        nats: Their code length.
        special_nats: Code length of the special tokens, the ends of documents.
    """

    tokens: int
    bytes: int
    nats: float
    special_nats: float = 0.0

    def __add__(self, other: Metrics) -> Metrics:
        return Metrics(
            self.tokens + other.tokens,
            self.bytes + other.bytes,
            self.nats + other.nats,
            self.special_nats + other.special_nats,
        )

    @property
    def nats_per_token(self) -> float:
        """Mean loss of a text token, nats; nan without tokens."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def bpb(self) -> float:
        """Bits per byte of text; nan without bytes."""
        return self.nats / (math.log(2) * self.bytes) if self.bytes else math.nan

    @property
    def bpb_with_eod(self) -> float:
        """Bits per byte with the ends of documents paid for; nan without bytes."""
        nats = self.nats + self.special_nats
        return nats / (math.log(2) * self.bytes) if self.bytes else math.nan

    def as_dict(self) -> dict[str, float]:
        """Return the metrics for JSON."""
        nats = self.nats_per_token
        return {
            "tokens": self.tokens,
            "bytes": self.bytes,
            "nats_per_token": nats,
            "bits_per_token": nats / math.log(2),
            "perplexity": math.exp(min(nats, 700.0)),
            "bpb": self.bpb,
            "bpb_with_eod": self.bpb_with_eod,
        }


class DomainSums:
    """Sums per domain, accumulated on the device without synchronisation.

    Args:
        domains: Names, in the order of their ids.
        device: Where the sums live. They are fp64: fp32 stops growing at 2^24 tokens.
    """

    def __init__(self, domains: list[str], device: torch.device) -> None:
        self.domains = domains
        self.sums = torch.zeros(len(domains), 4, dtype=torch.float64, device=device)

    def add(self, nats: Tensor, target_bytes: Tensor, is_text: Tensor, domain_ids: Tensor) -> None:
        """Add a batch.

        Args:
            nats: [B, T]; 0 where no target is predicted.
            target_bytes: Bytes of each target, [B, T]; 0 where no target is predicted.
            is_text: Whether the target is text, bool [B, T].
            domain_ids: Domain of each row, int64 [B].
        """
        columns = (
            is_text.double(),
            target_bytes.double(),
            nats.double() * is_text,
            nats.double() * ~is_text,
        )
        self.sums.index_add_(
            0, domain_ids, torch.stack([column.sum(dim=1) for column in columns], dim=1)
        )

    def by_domain(self) -> dict[str, Metrics]:
        """Return the metrics per domain; reads the device. Domains without tokens are left out."""
        metrics = {
            domain: Metrics(int(tokens), int(size), *nats)
            for domain, (tokens, size, *nats) in zip(self.domains, self.sums.tolist(), strict=True)
        }
        return {domain: m for domain, m in metrics.items() if m.tokens}

    def total(self) -> Metrics:
        """Return the metrics over all domains; reads the device."""
        tokens, size, *nats = self.sums.sum(dim=0).tolist()
        return Metrics(int(tokens), int(size), *nats)


def metrics_json(sums: DomainSums) -> dict[str, dict[str, Any]]:
    """Return {"domains": {name: metrics}, "total": metrics}, a form that scripts rely on."""
    return {
        "domains": {name: metrics.as_dict() for name, metrics in sums.by_domain().items()},
        "total": sums.total().as_dict(),
    }
