"""Paired differences in bits per byte between models scored on the same documents.

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


def paired_metrics(
    sizes: dict[str, np.ndarray], nats: dict[str, np.ndarray], resamples: int, seed: int
) -> list[dict[str, Any]]:
    """Compare models with the first one, the baseline.

    Args:
        sizes: Domain -> UTF-8 bytes of the documents, int64 [documents].
        nats: Domain -> nats, fp64 [models, seeds, documents].
        resamples: Number of bootstrap resamples.
        seed: Of the bootstrap.

    Returns:
        For each model {"domains": domain -> metrics, "total": metrics}. Metrics are means over
        seeds: `bpb`, of the baseline with its `interval`; of the others `difference` (below 0 is
        better than the baseline) with its `interval`. `by_seed`: bpb of the baseline, of others
        the difference from the baseline of that seed; `seed_sd`: its standard deviation. Intervals
        are percentiles with the probability CONFIDENCE; None where no domain has two documents.
    """
    resampled = dict(
        zip(
            nats,
            stratified([_columns(sizes[d], nats[d]) for d in nats], resamples, seed),
            strict=True,
        )
    )
    sums = {d: (int(sizes[d].sum()), nats[d].sum(axis=2), len(sizes[d])) for d in nats}
    total_size = sum(size for size, _, _ in sums.values())
    total_nats = np.sum([domain_nats for _, domain_nats, _ in sums.values()], axis=0)
    total_documents = sum(documents for _, _, documents in sums.values())
    total_resampled = np.sum(list(resampled.values()), axis=0)
    has_interval = any(len(s) > 1 for s in sizes.values())
    return [
        {
            "domains": {
                d: _metrics(model, *sums[d], resampled[d], len(sizes[d]) > 1) for d in nats
            },
            "total": _metrics(
                model, total_size, total_nats, total_documents, total_resampled, has_interval
            ),
        }
        for model in range(len(next(iter(nats.values()))))
    ]


def _columns(sizes: np.ndarray, nats: np.ndarray) -> np.ndarray:
    """Return the columns that are resampled, means over seeds, fp64 [documents, 1 + models].

    They are bytes, nats of the baseline, and the difference of each other model from those. The
    difference is taken before the sums, so that for two equal models it is exactly 0 in every
    resample.
    """
    means = nats.mean(axis=1)
    return np.stack([sizes, means[0], *(means[1:] - means[0])], axis=1)


def _metrics(
    model: int,
    size: int,
    nats: np.ndarray,
    documents: int,
    resampled: np.ndarray,
    has_interval: bool,
) -> dict[str, Any]:
    """Return the metrics of one model.

    Args:
        model: Its index; 0 is the baseline.
        size: Bytes of all documents.
        nats: Sums over documents [models, seeds].
        documents: Number of documents.
        resampled: Resampled sums of `_columns` [resamples, 1 + models].
        has_interval: Whether any domain has two documents.
    """
    bits = nats / (math.log(2) * size)
    by_seed = bits[model] - bits[0] if model else bits[0]
    ratios = resampled[:, 1 + model] / (math.log(2) * resampled[:, 0])
    metrics = {"documents": documents, "bytes": size, "bpb": float(bits[model].mean())}
    if model:
        metrics["difference"] = float(by_seed.mean())
    return metrics | {
        "interval": middle(ratios) if has_interval else None,
        "by_seed": by_seed.tolist(),
        "seed_sd": float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None,
    }
