"""Scoring on several processes of one machine: documents are divided, each opens the model.

The processes return nats per target, which are put together by document; so sums are taken in one
order, whatever the number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from nextpt.base.processes import exit_with_parent
from nextpt.evaluate.documents import Window, score_targets
from nextpt.evaluate.loaded_model import LoadedModel, open_model
from nextpt.evaluate.progress import Progress, ignore_progress


def score_on_ranks(
    loaded: LoadedModel,
    documents: Sequence[np.ndarray],
    windows: Sequence[Window],
    *,
    batch_size: int = 32,
    ranks: int = 1,
    progress: Progress = ignore_progress,
) -> list[np.ndarray]:
    """Do the same as `score_targets` on `ranks` processes.

    On GPUs rank r takes device r modulo their number.
    """
    if ranks == 1 or len(documents) < 2:
        return score_targets(
            loaded.model, documents, windows, batch_size=batch_size, progress=progress
        )
    ranks = min(ranks, len(documents))
    scores: list[np.ndarray] = [np.zeros(0)] * len(documents)
    with ProcessPoolExecutor(ranks, get_context("spawn"), exit_with_parent) as pool:
        share_of_job = {}
        for rank in range(ranks):
            share = range(rank, len(documents), ranks)
            rank_windows = [
                replace(w, document=w.document // ranks)
                for w in windows
                if w.document % ranks == rank
            ]
            job = pool.submit(
                _score_share,
                loaded.path,
                loaded.step,
                loaded.weights,
                rank,
                ranks,
                [documents[i] for i in share],
                rank_windows,
                batch_size,
            )
            share_of_job[job] = share
        for finished, job in enumerate(as_completed(share_of_job), 1):
            for i, nats in zip(share_of_job[job], job.result(), strict=True):
                scores[i] = nats
            progress(finished / ranks)
    return scores


def _score_share(
    path: Path,
    step: int | None,
    weights: str,
    rank: int,
    ranks: int,
    documents: list[np.ndarray],
    windows: list[Window],
    batch_size: int,
) -> list[np.ndarray]:
    """Score one rank's documents, in its own process."""
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", rank % gpus) if gpus else torch.device("cpu")
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    model = open_model(path, step, device, weights=weights).model
    return score_targets(model, documents, windows, batch_size=batch_size)
