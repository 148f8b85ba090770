"""Whether what is predicted with probability p comes in a share p of the cases.

Two curves. `top`: only the most probable token of each place counts, in 15 equal bins, and the
expected calibration error is sum_b n_b / n |share of hits in b - mean probability in b| (arXiv
1706.04599, eq. 3). `every`: all tokens of the vocabulary count at each place, in bins that widen by
the square root of ten, so that rare tokens are seen too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

TOP_BINS = np.linspace(0, 1, 16)
EVERY_BINS = np.concatenate(([0.0], 10 ** np.arange(-6, 0.25, 0.5)))
CONFIDENCE = 0.95


class Reliability:
    """Predictions and hits per bin of the predicted probability. edges: rising, from 0 to 1.

    A bin holds its lower edge.
    """

    def __init__(self, edges: np.ndarray) -> None:
        self.edges = edges
        self._inner = torch.from_numpy(edges[1:-1].copy())
        self.counts, self.hits = (torch.zeros(len(edges) - 1, dtype=torch.int64) for _ in range(2))
        self.sums = torch.zeros(len(edges) - 1, dtype=torch.float64)

    def add(self, probabilities: Tensor, hits: Tensor) -> None:
        """Probabilities [n] of predictions, and [m] of those among them that came true."""
        bins = len(self.counts)
        place, came = (
            torch.bucketize(p.double(), self._inner.to(p.device), right=True)
            for p in (probabilities, hits)
        )
        self.counts += torch.bincount(place, minlength=bins).cpu()
        self.hits += torch.bincount(came, minlength=bins).cpu()
        self.sums += torch.bincount(place, weights=probabilities.double(), minlength=bins).cpu()

    @property
    def expected_error(self) -> float:
        """The expected calibration error; nan where nothing was predicted."""
        return float((self.hits - self.sums).abs().sum() / self.counts.sum())

    def bins(self) -> list[dict[str, Any]]:
        """Of each bin that holds predictions: edges, count, mean probability, share that came true and its Wilson interval.

        The interval takes predictions for independent; those of neighbouring tokens are nearly so
        at best.
        """
        found = []
        for i in self.counts.nonzero().flatten().tolist():
            count, hits = int(self.counts[i]), int(self.hits[i])
            interval = binomtest(hits, count).proportion_ci(CONFIDENCE, method="wilson")
            found.append(
                {
                    "low": float(self.edges[i]),
                    "high": float(self.edges[i + 1]),
                    "count": count,
                    "predicted": float(self.sums[i]) / count,
                    "observed": hits / count,
                    "interval": [interval.low, interval.high],
                }
            )
        return found


class Calibration:
    """Both curves over the places that were added."""

    def __init__(self) -> None:
        self.places = 0
        self.top, self.every = Reliability(TOP_BINS), Reliability(EVERY_BINS)

    def add(self, logprobs_NV: Tensor, targets_N: Tensor) -> None:
        """logprobs: of the whole vocabulary at n places. targets: int64 [n], the tokens that came."""
        probabilities = logprobs_NV.exp().clamp(max=1.0)
        top, best = probabilities.max(-1)
        self.places += len(targets_N)
        self.top.add(top, top[best == targets_N])
        self.every.add(
            probabilities.flatten(), probabilities.gather(1, targets_N.unsqueeze(1)).squeeze(1)
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON. Probabilities are shares of 1; intervals are of 95 %."""
        return {
            "places": self.places,
            "confidence": CONFIDENCE,
            "expected_calibration_error": self.top.expected_error,
            "top": self.top.bins(),
            "every": self.every.bins(),
        }
