"""Token frequencies in the training shards, and frequency bands."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_prep.format import PADDING, DatasetManifest
from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import UserError
from nextpt.data.dataset import open_sequences
from nextpt.data.sequences import load_manifest
from nextpt.exchange import same_vocabulary

MOST_TOKENS = 20_000_000  # tokens counted at most; the bands are decades, which need no more
EDGES = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1.0)  # of the bands, as shares of all tokens


def training_counts(data: Path, tokenizer: Tokenizer) -> np.ndarray | None:
    """Count each token in the training shards, or in a sample of about MOST_TOKENS of them.

    Returns:
        int64 [V]; None where there are no shards, or they are of another tokenizer.
    """
    try:
        manifest = load_manifest(data)
        if not same_vocabulary(tokenizer.path, data / "tokenizer.json"):
            return None
        return _count(data, manifest, tokenizer.vocab_size)
    except (UserError, OSError):  # a loss can be given without counts
        return None


def _count(data: Path, manifest: DatasetManifest, vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size, dtype=np.int64)
    total = sum(c.sequences for c in manifest.splits["train"].values())
    # One of this many sequences is counted
    every = max(1, -(-total * (manifest.sequence_length + 1) // MOST_TOKENS))
    for sequences in open_sequences(data, "train").values():
        for number in range(0, len(sequences), every):
            sequence = sequences[number]
            real = np.repeat(sequence.doc_flags & PADDING, sequence.doc_lens) == 0
            counts += np.bincount(sequence.tokens[real], minlength=vocab_size)
    return counts


def band_of_tokens(counts: np.ndarray) -> np.ndarray:
    """Assign each token to a frequency band.

    Args:
        counts: How often each token occurred, int64 [V].

    Returns:
        int64 [V]: 0 for a token that never occurred, else 1 + the number of the band of EDGES that
        contains its share of all tokens.
    """
    shares = counts / max(int(counts.sum()), 1)
    return np.where(
        counts == 0, 0, np.clip(np.searchsorted(EDGES, shares, side="right"), 1, len(EDGES) - 1)
    )
