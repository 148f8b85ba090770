"""Contamination: n-grams of an evaluation set that occur in the training shards.

N-grams are of 13 words, and of 50 characters (ngrams.py). The texts of the training side are
decoded from the shards themselves, piece by piece, so what is searched is what was trained on. A
document longer than a sequence is in the shards in pieces; an n-gram that such a cut divides is not
seen. So every overlap of 25 words, or of 99 characters, is found wherever it is, and a shorter one
where no cut goes through it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.format import PADDING
from data_prep.tokenizer import Tokenizer
from nextpt.data.dataset import open_sequences
from nextpt.evaluate.memorization.ngrams import CHARACTERS, WORDS, Units, ngram_hashes, units
from nextpt.evaluate.progress import Progress, ignore_progress

CHARACTERS_AT_ONCE = 2**22  # characters of training text that are looked up at a time
KINDS = {"words": WORDS, "characters": CHARACTERS}


@dataclass(frozen=True)
class DocumentOverlap:
    """Overlap of one document of the evaluation set with the training text.

    Attributes:
        domain: Its domain.
        number: Its number in the domain.
        shares: Kind of n-gram -> share of its n-grams that occur in the training text; 0 for a
            text that is shorter than one.
    """

    domain: str
    number: int
    shares: dict[str, float]

    @property
    def contaminated(self) -> bool:
        """Whether it shares any n-gram with the training text."""
        return any(self.shares.values())


def training_texts(
    data: Path, tokenizer: Tokenizer, progress: Progress = ignore_progress
) -> Iterator[str]:
    """Decode all pieces of documents in the training shards of a dataset folder, by domain.

    Args:
        data: The dataset folder.
        tokenizer: The dataset's.
        progress: Gets the share of the sequences that is done.

    Raises:
        DataError: The shards cannot be read.
    """
    domains = open_sequences(data, "train")
    total, seen = sum(len(sequences) for sequences in domains.values()), 0
    for sequences in domains.values():
        for number in range(len(sequences)):
            sequence = sequences[number]
            pieces = np.split(sequence.tokens, np.cumsum(sequence.doc_lens)[:-1])
            for tokens, flags in zip(pieces, sequence.doc_flags, strict=True):
                if not flags & PADDING:
                    yield tokenizer.decode(tokens)
            seen += 1
            progress(seen / total)


def find_overlaps(
    evaluated: Mapping[str, Sequence[str]], training: Iterator[str]
) -> list[DocumentOverlap]:
    """Compute the overlap of every document of an evaluation set with the training texts.

    Args:
        evaluated: Domain -> documents of the evaluation set.
        training: Training texts.
    """
    documents = [
        (domain, number, units(text))
        for domain, texts in evaluated.items()
        for number, text in enumerate(texts)
    ]
    hashes_of = {
        kind: [ngram_hashes(getattr(u, kind), length) for _, _, u in documents]
        for kind, length in KINDS.items()
    }
    sought = {
        kind: np.unique(np.concatenate([np.zeros(0, np.uint64), *hashes]))
        for kind, hashes in hashes_of.items()
    }
    seen = {kind: np.zeros(len(values), bool) for kind, values in sought.items()}
    for group in _groups(training):
        for kind, length in KINDS.items():
            _mark(
                seen[kind],
                sought[kind],
                np.concatenate([ngram_hashes(getattr(u, kind), length) for u in group]),
            )
    return [
        DocumentOverlap(
            domain,
            number,
            {kind: _share(hashes_of[kind][i], sought[kind], seen[kind]) for kind in KINDS},
        )
        for i, (domain, number, _) in enumerate(documents)
    ]


def _groups(texts: Iterator[str]) -> Iterator[list[Units]]:
    group: list[Units] = []
    size = 0
    for text in texts:
        group.append(units(text))
        size += len(text)
        if size >= CHARACTERS_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _mark(seen: np.ndarray, sought: np.ndarray, hashes: np.ndarray) -> None:
    """Mark in `seen` which of the sorted `sought` are among `hashes`."""
    if len(sought) and len(hashes):
        indices = np.searchsorted(sought, hashes)
        indices[indices == len(sought)] = 0
        seen[indices[sought[indices] == hashes]] = True


def _share(hashes: np.ndarray, sought: np.ndarray, seen: np.ndarray) -> float:
    return float(seen[np.searchsorted(sought, hashes)].mean()) if len(hashes) else 0.0
