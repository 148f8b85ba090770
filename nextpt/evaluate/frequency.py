"""How often each token came in training, and bands of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_prep.format import PADDING, DatasetManifest
from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import UserError
from nextpt.data.dataset import open_sequences
from nextpt.data.sequences import load_manifest
from nextpt.exchange import same_vocabulary

MOST_TOKENS = 20_000_000  # counted; the bands are decades, which need no more
EDGES = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1.0)  # shares of all tokens


def training_counts(data: Path, tokenizer: Tokenizer) -> np.ndarray | None:
    """int64 [V]: how often each token stands in the training shards, or in about MOST_TOKENS of them where there are more.

    None where there are no shards here, or they are of another tokenizer.
    """
    try:
        manifest = load_manifest(data)
        if not same_vocabulary(tokenizer.path, data / "tokenizer.json"):
            return None
        return _count(data, manifest, tokenizer.vocab_size)
    except (UserError, OSError):  # counts are no reason to give no loss
        return None


def _count(data: Path, manifest: DatasetManifest, vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size, dtype=np.int64)
    total = sum(c.rows for c in manifest.splits["train"].values())
    # Of this many rows one is counted
    every = max(1, -(-total * (manifest.sequence_length + 1) // MOST_TOKENS))
    for rows in open_sequences(data, "train").values():
        for number in range(0, len(rows), every):
            row = rows[number]
            real = np.repeat(row.doc_flags & PADDING, row.doc_lens) == 0
            counts += np.bincount(row.tokens[real], minlength=vocab_size)
    return counts


def band_of_tokens(counts: np.ndarray) -> np.ndarray:
    """int64 [V]: 0 for a token that never came, else 1 + the number of the band of EDGES that its share of all tokens is in."""
    shares = counts / max(int(counts.sum()), 1)
    return np.where(
        counts == 0, 0, np.clip(np.searchsorted(EDGES, shares, side="right"), 1, len(EDGES) - 1)
    )
