"""Calibration: predicted probability against observed frequency.

Two curves. `top`: only the most probable token of each position counts, in 15 equal bins, and the
expected calibration error is sum_b n_b / n |share of hits in b - mean probability in b| (arXiv
1706.04599, eq. 3). `every`: all tokens of the vocabulary count at each position, in bins that widen
by the square root of ten, so that rare tokens are seen too.
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
    """Counts of predictions and hits per bin of the predicted probability.

    Args:
        edges: Edges of the bins, rising from 0 to 1; a bin holds its lower edge.
    """

    def __init__(self, edges: np.ndarray) -> None:
        self.edges = edges
        self._inner = torch.from_numpy(edges[1:-1].copy())
        self.counts, self.hits = (torch.zeros(len(edges) - 1, dtype=torch.int64) for _ in range(2))
        self.sums = torch.zeros(len(edges) - 1, dtype=torch.float64)

    def add(self, probabilities: Tensor, hits: Tensor) -> None:
        """Add predictions.

        Args:
            probabilities: Predicted probabilities, [n].
            hits: Those among them that came true, [m].
        """
        bins = len(self.counts)
        all_bins, hit_bins = (
            torch.bucketize(p.double(), self._inner.to(p.device), right=True)
            for p in (probabilities, hits)
        )
        self.counts += torch.bincount(all_bins, minlength=bins).cpu()
        self.hits += torch.bincount(hit_bins, minlength=bins).cpu()
        self.sums += torch.bincount(all_bins, weights=probabilities.double(), minlength=bins).cpu()

    @property
    def expected_error(self) -> float:
        """Expected calibration error; nan without predictions."""
        return float((self.hits - self.sums).abs().sum() / self.counts.sum())

    def bins(self) -> list[dict[str, Any]]:
        """Describe each bin that holds predictions, for JSON.

        `interval` is the Wilson interval of the observed share. It takes predictions for
        independent; those of neighbouring tokens are nearly so at best.
        """
        described = []
        for i in self.counts.nonzero().flatten().tolist():
            count, hits = int(self.counts[i]), int(self.hits[i])
            interval = binomtest(hits, count).proportion_ci(CONFIDENCE, method="wilson")
            described.append(
                {
                    "low": float(self.edges[i]),
                    "high": float(self.edges[i + 1]),
                    "count": count,
                    "predicted": float(self.sums[i]) / count,
                    "observed": hits / count,
                    "interval": [interval.low, interval.high],
                }
            )
        return described


class Calibration:
    """Both curves over the positions that were added."""

    def __init__(self) -> None:
        self.positions = 0
        self.top = Reliability(TOP_BINS)
        self.every = Reliability(EVERY_BINS)

    def add(self, logprobs_NV: Tensor, targets_N: Tensor) -> None:
        """Add n positions.

        Args:
            logprobs_NV: Log-probabilities of the whole vocabulary.
            targets_N: The tokens that came, int64.
        """
        probabilities = logprobs_NV.exp().clamp(max=1.0)
        top, best = probabilities.max(-1)
        self.positions += len(targets_N)
        self.top.add(top, top[best == targets_N])
        self.every.add(
            probabilities.flatten(), probabilities.gather(1, targets_N.unsqueeze(1)).squeeze(1)
        )

    def as_dict(self) -> dict[str, Any]:
        """Describe the curves for JSON; probabilities are shares of 1, intervals are of 95 %."""
        return {
            "positions": self.positions,
            "confidence": CONFIDENCE,
            "expected_calibration_error": self.top.expected_error,
            "top": self.top.bins(),
            "every": self.every.bins(),
        }
