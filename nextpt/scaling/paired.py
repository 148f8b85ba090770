"""Differences in bits per byte between models that were scored on the same documents, with paired intervals.

Documents differ far more from each other than models do, so the difference is taken document by
document and the documents are resampled afterwards: every resample draws the same documents for all
models (the paired bootstrap; Koehn, EMNLP 2004). Such an interval says how the difference depends
on the documents. How it depends on the seed of a training, the differences of the seeds say, of
which there are mostly too few for an interval of their own.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nextpt.evaluate.bootstrap import middle, stratified


def paired_figures(
    sizes: dict[str, np.ndarray], nats: dict[str, np.ndarray], resamples: int, seed: int
) -> list[dict[str, Any]]:
    """Of each model {"domains": domain -> figures, "total": figures}. The first is the baseline, which the others are compared with.

    sizes: domain -> int64 [documents], UTF-8 bytes. nats: domain -> fp64 [models, seeds,
    documents]. Figures are means over seeds: `bpb`, of the baseline with its `interval`; of
    the others `difference` (below 0: better than the baseline) with its `interval`. `by_seed`: of
    the baseline bpb, of others the difference from the baseline of that seed; `seed_sd`: their
    standard deviation. Intervals are percentiles that hold CONFIDENCE; null where no domain has two
    documents.
    """
    drawn = dict(
        zip(
            nats,
            stratified([_columns(sizes[d], nats[d]) for d in nats], resamples, seed),
            strict=True,
        )
    )
    sums = {d: (int(sizes[d].sum()), nats[d].sum(axis=2), len(sizes[d])) for d in nats}
    total = (
        *map(sum, zip(*sums.values(), strict=True)),
        sum(drawn.values()),
        any(len(s) > 1 for s in sizes.values()),
    )
    return [
        {
            "domains": {d: _figures(model, *sums[d], drawn[d], len(sizes[d]) > 1) for d in nats},
            "total": _figures(model, *total),
        }
        for model in range(len(next(iter(nats.values()))))
    ]


def _columns(sizes: np.ndarray, nats: np.ndarray) -> np.ndarray:
    """fp64 [documents, 1 + models]: bytes, nats of the baseline, and nats of each other model less those. Means over seeds.

    The difference is taken before the sums, so that of two models that are the same it is exactly 0
    in every resample.
    """
    means = nats.mean(axis=1)
    return np.stack([sizes, means[0], *(means[1:] - means[0])], axis=1)


def _figures(
    model: int, size: int, nats: np.ndarray, documents: int, drawn: np.ndarray, several: bool
) -> dict[str, Any]:
    """Nats [models, seeds]: sums over documents. drawn [resamples, 1 + models]: resampled sums of `_columns`."""
    bits = nats / (math.log(2) * size)
    by_seed = bits[model] - bits[0] if model else bits[0]
    ratios = drawn[:, 1 + model] / (math.log(2) * drawn[:, 0])
    found = {"documents": documents, "bytes": size, "bpb": float(bits[model].mean())}
    if model:
        found["difference"] = float(by_seed.mean())
    return found | {
        "interval": middle(ratios) if several else None,
        "by_seed": by_seed.tolist(),
        "seed_sd": float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None,
    }
