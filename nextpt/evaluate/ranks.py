"""Scoring on several processes of one machine: documents are divided, each rank opens the model by itself.

What comes back are nats per target, put together again by document; so sums are taken in one order,
whatever the number of ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from nextpt.evaluate.documents import Window, score_targets
from nextpt.evaluate.source import Source, open_source


def score_on_ranks(
    source: Source,
    documents: Sequence[np.ndarray],
    planned: Sequence[Window],
    *,
    rows: int = 32,
    ranks: int = 1,
    progress: Callable[[float], None] = lambda share: None,
) -> list[np.ndarray]:
    """As `score_targets`. ranks: processes; on GPUs rank r takes device r modulo their number."""
    if ranks == 1 or len(documents) < 2:
        return score_targets(source.model, documents, planned, rows=rows, progress=progress)
    ranks = min(ranks, len(documents))
    found: list[np.ndarray] = [np.zeros(0)] * len(documents)
    shares = [range(rank, len(documents), ranks) for rank in range(ranks)]
    with ProcessPoolExecutor(ranks, get_context("spawn")) as pool:
        jobs = {}
        for rank, share in enumerate(shares):
            own = [
                replace(w, document=w.document // ranks)
                for w in planned
                if w.document % ranks == rank
            ]
            jobs[
                pool.submit(
                    _score,
                    source.path,
                    source.step,
                    rank,
                    ranks,
                    [documents[i] for i in share],
                    own,
                    rows,
                )
            ] = share
        for done, job in enumerate(as_completed(jobs), 1):
            for i, nats in zip(jobs[job], job.result(), strict=True):
                found[i] = nats
            progress(done / ranks)
    return found


def _score(
    path: Path,
    step: int | None,
    rank: int,
    ranks: int,
    documents: list[np.ndarray],
    planned: list[Window],
    rows: int,
) -> list[np.ndarray]:
    """What one rank does."""
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", rank % gpus) if gpus else torch.device("cpu")
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    return score_targets(open_source(path, step, device).model, documents, planned, rows=rows)
