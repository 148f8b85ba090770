"""What of an evaluation set stands in the training shards: stretches of 13 words, and of 50 characters (ngrams.py).

The texts of the training side are decoded from the shards themselves, piece by piece, so what is
looked through is what was trained on. A document longer than a row lies there in pieces; a stretch
that such a cut divides is not seen. So every overlap of 25 words, or of 99 characters, is found
wherever it lies, and a shorter one where no cut goes through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.format import PADDING
from data_prep.tokenizer import Tokenizer
from nextpt.data.dataset import open_sequences
from nextpt.evaluate.memorization.ngrams import CHARACTERS, WORDS, Units, stretch_hashes, units

GATHERED = 2**22  # characters of training text that are looked up at a time
KINDS = {"words": WORDS, "characters": CHARACTERS}


@dataclass(frozen=True)
class Found:
    """One document of the evaluation set. shares: kind of stretch -> share of its stretches that the training text has, 0 for a text that is shorter than one."""

    domain: str
    number: int
    shares: dict[str, float]

    @property
    def contaminated(self) -> bool:
        """Whether it shares any stretch with the training text."""
        return any(self.shares.values())


def training_texts(
    data: Path, tokenizer: Tokenizer, progress: Callable[[float], None] = lambda share: None
) -> Iterator[str]:
    """Texts of all pieces of documents in the training shards of a dataset folder, domain by domain. Raises DataError."""
    domains = open_sequences(data, "train")
    total, seen = sum(len(rows) for rows in domains.values()), 0
    for rows in domains.values():
        for number in range(len(rows)):
            row = rows[number]
            for tokens, flags in zip(
                np.split(row.tokens, np.cumsum(row.doc_lens)[:-1]), row.doc_flags, strict=True
            ):
                if not flags & PADDING:
                    yield tokenizer.decode(tokens)
            seen += 1
            progress(seen / total)


def find_overlaps(evaluated: dict[str, Sequence[str]], training: Iterator[str]) -> list[Found]:
    """For every document of the evaluation set (domain -> texts), how much of it the training texts have."""
    documents = [
        (domain, number, units(text))
        for domain, texts in evaluated.items()
        for number, text in enumerate(texts)
    ]
    own = {
        kind: [stretch_hashes(getattr(u, kind), length) for _, _, u in documents]
        for kind, length in KINDS.items()
    }
    sought = {
        kind: np.unique(np.concatenate([np.zeros(0, np.uint64), *hashes]))
        for kind, hashes in own.items()
    }
    seen = {kind: np.zeros(len(values), bool) for kind, values in sought.items()}
    for group in _groups(training):
        for kind, length in KINDS.items():
            _mark(
                seen[kind],
                sought[kind],
                np.concatenate([stretch_hashes(getattr(u, kind), length) for u in group]),
            )
    return [
        Found(
            domain, number, {kind: _share(own[kind][i], sought[kind], seen[kind]) for kind in KINDS}
        )
        for i, (domain, number, _) in enumerate(documents)
    ]


def _groups(texts: Iterator[str]) -> Iterator[list[Units]]:
    group: list[Units] = []
    size = 0
    for text in texts:
        group.append(units(text))
        size += len(text)
        if size >= GATHERED:
            yield group
            group, size = [], 0
    if group:
        yield group


def _mark(seen: np.ndarray, sought: np.ndarray, hashes: np.ndarray) -> None:
    """Note which of the sorted `sought` are among `hashes`."""
    if len(sought) and len(hashes):
        places = np.searchsorted(sought, hashes)
        places[places == len(sought)] = 0
        seen[places[sought[places] == hashes]] = True


def _share(hashes: np.ndarray, sought: np.ndarray, seen: np.ndarray) -> float:
    return float(seen[np.searchsorted(sought, hashes)].mean()) if len(hashes) else 0.0
