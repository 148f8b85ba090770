"""Task scores: exact match and, from the same pass, the smooth metrics beneath it.

One pass over prompt and answer tells whether greedy decoding would have written the answer: its
tokens are the most probable ones, each given the prompt and the right tokens before it, exactly
when greedy decoding writes them. The probability of an answer of m tokens is exp(-nats), so where
tokens have similar losses L, exact match follows exp(-m L): a small change of L moves it much.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

from nextpt.evaluate.bootstrap import CONFIDENCE, ratio_interval, resampled_sums
from nextpt.evaluate.documents import score_documents
from nextpt.evaluate.loaded_model import LoadedModel
from nextpt.evaluate.progress import (
    PartProgress,
    Progress,
    ignore_part_progress,
    ignore_progress,
)
from nextpt.evaluate.tasks.items import Item, Material, make_items
from nextpt.evaluate.texts import encode_document

LOGITS_AT_ONCE = 2**24  # elements
# Tokens of each domain, at least, that the held-out loss beside the tasks is measured on
LOSS_TOKENS = 2**15


def measure_tasks(
    loaded: LoadedModel,
    texts: dict[str, list[str]],
    names: Sequence[str],
    *,
    items: int = 200,
    batch_size: int = 32,
    seed: int = 0,
    resamples: int = 1000,
    progress: PartProgress = ignore_part_progress,
) -> dict[str, Any]:
    """Score a model on built-in tasks.

    Args:
        loaded: The model.
        texts: Domain -> held-out documents, for cloze.
        names: Names of the tasks.
        items: Items of each task.
        batch_size: Items per forward pass.
        seed: Seed of the items and of the bootstrap.
        resamples: Resamples of the bootstrap.
        progress: Gets (task, share of it that is done).

    Returns:
        Task -> metrics.

    Raises:
        DataError: There is no such task, or not one item of it fits the model.
    """
    material = Material(
        loaded.tokenizer,
        [text for documents in texts.values() for text in documents],
        loaded.model.max_position,
    )
    # All items are made first, so that errors come before work
    items_of = {name: make_items(name, material, items, seed) for name in names}
    metrics = {}
    for name, task_items in items_of.items():
        nats, hits = score_items(loaded, task_items, batch_size, partial(progress, name))
        metrics[name] = _metrics(task_items, nats, hits, resamples, seed)
    return metrics


def validation_loss(
    loaded: LoadedModel, texts: dict[str, list[str]], batch_size: int
) -> dict[str, float]:
    """Measure the loss that tasks are plotted over.

    It is that of the first documents of each domain, LOSS_TOKENS of them.
    """
    tokens, sizes = [], []
    for documents in texts.values():
        scored = 0
        for text in documents:
            encoded, bytes_of = encode_document(loaded.tokenizer, text)
            keep = min(len(encoded), LOSS_TOKENS - scored + 1)
            tokens.append(encoded[:keep])
            sizes.append(bytes_of[: keep - 1])
            scored += keep - 1
            if scored >= LOSS_TOKENS:
                break
    window = loaded.model.max_position
    metrics, _ = score_documents(
        loaded.model,
        tokens,
        sizes,
        loaded.tokenizer.token_bytes(),
        window=window,
        stride=max(1, window // 2),
        batch_size=batch_size,
    )
    return {
        "tokens": metrics.tokens,
        "nats_per_token": metrics.nats_per_token,
        "bpb": metrics.bpb,
    }


def score_items(
    loaded: LoadedModel,
    items: Sequence[Item],
    batch_size: int = 32,
    progress: Progress = ignore_progress,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Score the answers of items.

    Args:
        loaded: The model.
        items: The items.
        batch_size: Items per forward pass.
        progress: Gets the share of the items that is done.

    Returns:
        Per item the nats of each answer token, fp64, and whether it was the most probable token,
        bool.
    """
    order = sorted(range(len(items)), key=lambda i: -len(items[i].prompt) - len(items[i].answer))
    nats, hits = [np.zeros(0)] * len(items), [np.zeros(0, bool)] * len(items)
    for first in range(0, len(order), batch_size):
        group = order[first : first + batch_size]
        scores = _score(loaded, [items[i] for i in group])
        for i, (item_nats, item_hits) in zip(group, scores, strict=True):
            nats[i], hits[i] = item_nats, item_hits
        progress((first + len(group)) / len(order))
    return nats, hits


@torch.no_grad()
def _score(loaded: LoadedModel, items: Sequence[Item]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Score items together, padded on the right, to which no token of theirs attends."""
    device = next(loaded.model.parameters()).device
    texts = [item.prompt + item.answer for item in items]
    inputs = torch.zeros(len(items), max(map(len, texts)) - 1, dtype=torch.long)
    for row, text in enumerate(texts):
        inputs[row, : len(text) - 1] = torch.tensor(text[:-1])
    inputs = inputs.to(device)
    positions = torch.arange(inputs.shape[1], device=device).expand_as(inputs)
    hidden = loaded.model(inputs, positions).hidden
    before_answers = torch.cat(
        [
            hidden[row, len(item.prompt) - 1 : len(item.prompt) + len(item.answer) - 1]
            for row, item in enumerate(items)
        ]
    )
    targets = torch.tensor([token for item in items for token in item.answer], device=device)
    nats, hits = _score_targets(loaded, before_answers, targets)
    ends = np.cumsum([len(item.answer) for item in items])[:-1]
    return list(zip(np.split(nats, ends), np.split(hits, ends), strict=True))


def _score_targets(
    loaded: LoadedModel, hidden_ND: Tensor, targets_N: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    nats, hits = [], []
    at_once = max(1, LOGITS_AT_ONCE // loaded.model.vocab_size)
    for first in range(0, len(targets_N), at_once):
        logits = loaded.model.lm_head(hidden_ND[first : first + at_once]).float()
        targets = targets_N[first : first + at_once]
        nats.append(-logits.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1).double())
        hits.append(logits.argmax(-1) == targets)
    return torch.cat(nats).cpu().numpy(), torch.cat(hits).cpu().numpy()


def _metrics(
    items: Sequence[Item], nats: list[np.ndarray], hits: list[np.ndarray], resamples: int, seed: int
) -> dict[str, Any]:
    """Summarize the scores of a task.

    `exact` is the share of items written exactly, with its Wilson interval; the intervals of the
    others are by bootstrap of items.
    """
    exact, summed = np.array([h.all() for h in hits]), np.array([n.sum() for n in nats])
    sums = np.stack(
        [
            np.ones(len(items)),
            [len(n) for n in nats],
            summed,
            [h.sum() for h in hits],
            np.exp(-summed),
        ],
        axis=1,
    )
    resampled = resampled_sums(sums, resamples, np.random.default_rng(seed))
    count, tokens, loss, right, probability = range(5)
    wilson = binomtest(int(exact.sum()), len(exact)).proportion_ci(CONFIDENCE, method="wilson")

    def ratio(numerator: int, denominator: int) -> dict[str, Any]:
        return {
            "value": float(sums[:, numerator].sum() / sums[:, denominator].sum()),
            "interval": ratio_interval(resampled[:, numerator], resampled[:, denominator]),
        }

    chances = [item.chance for item in items if item.chance is not None]
    return {
        "items": len(items),
        "answer_tokens": int(sums[:, tokens].sum()),
        "chance": float(np.mean(chances)) if chances else None,
        "exact": {
            "value": float(exact.mean()),
            "interval": [float(wilson.low), float(wilson.high)],
        },
        "token_accuracy": ratio(right, tokens),
        "probability": ratio(probability, count),
        "nats_per_token": ratio(loss, tokens),
    }
