"""Per-domain sums of nats, tokens and bytes.

Every figure is a ratio of such sums, never a mean of ratios.

In `nats_per_token`, `perplexity` and `bpb` only text counts: the nats and the number of
special tokens (start and end of document) are left out, the bytes are those of all text, so
`bpb` = sum(nats) / (ln 2 * sum(bytes)) depends on the text and not on how it was cut into
tokens. `bpb_with_eod` pays for the ends of documents too, over the same bytes: what a file that can be
decoded costs. Where a tokenizer changes text, a text token may stand for no bytes and the end of a
document for some (spaces that were stripped).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Metrics:
    """What the sums say. tokens: text tokens predicted. bytes: UTF-8 bytes they stand for. nats: their code length.

    special_nats: the code length of the special tokens that were predicted, the ends of documents.
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
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def bpb(self) -> float:
        return self.nats / (math.log(2) * self.bytes) if self.bytes else math.nan

    @property
    def bpb_with_eod(self) -> float:
        return (
            (self.nats + self.special_nats) / (math.log(2) * self.bytes) if self.bytes else math.nan
        )

    def as_dict(self) -> dict[str, float]:
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
    """Accumulates on the device, without synchronisation.

    fp64 because fp32 stops growing at 2^24 tokens.
    """

    def __init__(self, domains: list[str], device: torch.device) -> None:
        self.domains = domains
        self.sums = torch.zeros(len(domains), 4, dtype=torch.float64, device=device)

    def add(self, nats: Tensor, target_bytes: Tensor, is_text: Tensor, domain_ids: Tensor) -> None:
        """nats, target_bytes, is_text [B, T], nats and bytes 0 where no target is predicted.

        domain_ids [B].
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

    def figures(self) -> dict[str, Metrics]:
        """Figures per domain; reads the device. Domains without a token are left out."""
        rows = self.sums.tolist()
        found = {
            d: Metrics(int(tokens), int(size), *nats)
            for d, (tokens, size, *nats) in zip(self.domains, rows, strict=True)
        }
        return {domain: figures for domain, figures in found.items() if figures.tokens}

    def total(self) -> Metrics:
        tokens, size, *nats = self.sums.sum(dim=0).tolist()
        return Metrics(int(tokens), int(size), *nats)


def metrics_json(sums: DomainSums) -> dict[str, dict]:
    """{"domains": {name: figures}, "total": figures}: the fixed form that scripts rely on."""
    return {
        "domains": {name: figures.as_dict() for name, figures in sums.figures().items()},
        "total": sums.total().as_dict(),
    }
