"""Scoring tasks: exact match and, from the same pass, the smooth figures beneath it.

One pass over prompt and answer tells whether greedy decoding would have written the answer: its
tokens are the most probable ones, each given the prompt and the right tokens before it, exactly
when greedy decoding writes them. The probability of an answer of m tokens is exp(-nats), so where
tokens have like losses L, exact match follows exp(-m L): a small change of L moves it much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

from nextpt.evaluate.bootstrap import CONFIDENCE, ratio_interval, resampled_sums
from nextpt.evaluate.documents import score_documents
from nextpt.evaluate.heldout import encode_document
from nextpt.evaluate.source import Source
from nextpt.evaluate.tasks.items import Item, Material, make_items

LOGITS_AT_ONCE = 2**24  # elements
# Of each domain, at least, that the held-out loss beside the tasks is measured on
LOSS_TOKENS = 2**15


def measure_tasks(
    source: Source,
    texts: dict[str, list[str]],
    names: Sequence[str],
    *,
    items: int = 200,
    rows: int = 32,
    seed: int = 0,
    resamples: int = 1000,
    progress: Callable[[str, float], None] = lambda name, share: None,
) -> dict[str, Any]:
    """{task: figures} of a model. texts: domain -> held-out documents, for cloze. progress: hears (task, share that is done). Raises DataError."""
    material = Material(
        source.tokenizer,
        [text for documents in texts.values() for text in documents],
        source.config.max_position,
    )
    made = {name: make_items(name, material, items, seed) for name in names}  # mistakes before work
    found = {}
    for name, of_task in made.items():
        nats, hits = score_items(
            source, of_task, rows, lambda share, name=name: progress(name, share)
        )
        found[name] = _figures(of_task, nats, hits, resamples, seed)
    return found


def heldout_loss(source: Source, texts: dict[str, list[str]], rows: int) -> dict[str, float]:
    """Figures over the first documents of each domain, LOSS_TOKENS of them: the loss that tasks are drawn over."""
    tokens, sizes = [], []
    for documents in texts.values():
        taken = 0
        for text in documents:
            encoded, bytes_of = encode_document(source.tokenizer, text)
            keep = min(len(encoded), LOSS_TOKENS - taken + 1)
            tokens.append(encoded[:keep])
            sizes.append(bytes_of[: keep - 1])
            taken += keep - 1
            if taken >= LOSS_TOKENS:
                break
    window = source.config.max_position
    figures, _ = score_documents(
        source.model,
        tokens,
        sizes,
        source.tokenizer.token_bytes(),
        window=window,
        stride=max(1, window // 2),
        rows=rows,
    )
    return {
        "tokens": figures.tokens,
        "nats_per_token": figures.nats_per_token,
        "bpb": figures.bpb,
    }


def score_items(
    source: Source,
    items: Sequence[Item],
    rows: int = 32,
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Per item: nats of each answer token, fp64, and whether it was the most probable token, bool. rows: items per forward pass."""
    order = sorted(range(len(items)), key=lambda i: -len(items[i].prompt) - len(items[i].answer))
    nats, hits = [np.zeros(0)] * len(items), [np.zeros(0, bool)] * len(items)
    for first in range(0, len(order), rows):
        group = order[first : first + rows]
        for i, (of_item, right) in zip(
            group, _score(source, [items[i] for i in group]), strict=True
        ):
            nats[i], hits[i] = of_item, right
        progress((first + len(group)) / len(order))
    return nats, hits


@torch.no_grad()
def _score(source: Source, items: Sequence[Item]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Items are padded on the right, where no token of theirs looks."""
    device = next(source.model.parameters()).device
    texts = [item.prompt + item.answer for item in items]
    inputs = torch.zeros(len(items), max(map(len, texts)) - 1, dtype=torch.long)
    for row, text in enumerate(texts):
        inputs[row, : len(text) - 1] = torch.tensor(text[:-1])
    inputs = inputs.to(device)
    hidden = source.model(inputs, torch.arange(inputs.shape[1], device=device).expand_as(inputs))
    asked = torch.cat(
        [
            hidden[row, len(item.prompt) - 1 : len(item.prompt) + len(item.answer) - 1]
            for row, item in enumerate(items)
        ]
    )
    targets = torch.tensor([token for item in items for token in item.answer], device=device)
    nats, hits = _against(source, asked, targets)
    ends = np.cumsum([len(item.answer) for item in items])[:-1]
    return list(zip(np.split(nats, ends), np.split(hits, ends), strict=True))


def _against(source: Source, hidden_ND: Tensor, targets_N: Tensor) -> tuple[np.ndarray, np.ndarray]:
    nats, hits = [], []
    at_once = max(1, LOGITS_AT_ONCE // source.config.model.vocab_size)
    for some, came in zip(hidden_ND.split(at_once), targets_N.split(at_once), strict=True):
        logits = source.model.lm_head(some).float()
        nats.append(-logits.log_softmax(-1).gather(1, came.unsqueeze(1)).squeeze(1).double())
        hits.append(logits.argmax(-1) == came)
    return torch.cat(nats).cpu().numpy(), torch.cat(hits).cpu().numpy()


def _figures(
    items: Sequence[Item], nats: list[np.ndarray], hits: list[np.ndarray], resamples: int, seed: int
) -> dict[str, Any]:
    """exact: share of items written exactly, with Wilson's interval.

    The others: bootstrap of items.
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
    drawn = resampled_sums(sums, resamples, np.random.default_rng(seed))
    one, tokens, loss, right, probability = range(5)
    wilson = binomtest(int(exact.sum()), len(exact)).proportion_ci(CONFIDENCE, method="wilson")

    def ratio(top: int, bottom: int) -> dict[str, Any]:
        return {
            "value": float(sums[:, top].sum() / sums[:, bottom].sum()),
            "interval": ratio_interval(drawn[:, top], drawn[:, bottom]),
        }

    return {
        "items": len(items),
        "answer_tokens": int(sums[:, tokens].sum()),
        "chance": (
            float(np.mean([item.chance for item in items])) if items[0].chance is not None else None
        ),
        "exact": {
            "value": float(exact.mean()),
            "interval": [float(wilson.low), float(wilson.high)],
        },
        "token_accuracy": ratio(right, tokens),
        "probability": ratio(probability, one),
        "nats_per_token": ratio(loss, tokens),
    }
