"""Canaries: random texts planted in a corpus a known number of times, and their exposure.

Exposure of a canary (arXiv 1802.08232, section 4): log2(controls + 1) - log2(rank), with its rank
by code length among controls that the model never saw: 0 bits for a canary that is no more likely
than they are, log2(controls + 1) for one that is more likely than all of them.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from nextpt.base.errors import DataError
from nextpt.base.files import atomic_write

REPEATS = (1, 2, 4, 8, 16, 32, 64, 128)
WORDS = 16  # two syllables each, of 100: 213 random bits in every canary
SYLLABLES = [c + v for c in "bdfghjklmnprstvwxyzc" for v in "aeiou"]


@dataclass(frozen=True)
class Canary:
    """A random text.

    Attributes:
        text: The text.
        repeats: How often it is in the corpus; 0 for a control.
    """

    text: str
    repeats: int


def make_canaries(per_repeats: int, controls: int, seed: int) -> list[Canary]:
    """Draw canaries and controls.

    Documents are held out by the hash of their text when it is low (data_prep), so only texts with
    a hash in the upper half are used: with a held-out fraction of up to a half none of them is.

    Args:
        per_repeats: Canaries for every number of REPEATS.
        controls: Canaries that the model is never shown.
        seed: Seed of the texts.
    """
    rng = random.Random(seed)
    repeats_of = [repeats for repeats in REPEATS for _ in range(per_repeats)] + [0] * controls
    texts: dict[str, None] = {}
    while len(texts) < len(repeats_of):
        words = ("".join(rng.choices(SYLLABLES, k=2)) for _ in range(WORDS))
        text = f"The phrase is {' '.join(words)}.\n"
        if xxhash.xxh64_intdigest(text.encode()) >= 2**63:
            texts[text] = None
    return [Canary(text, repeats) for text, repeats in zip(texts, repeats_of, strict=True)]


def write_canaries(canaries: Sequence[Canary], folder: Path) -> None:
    """Write canaries to a folder.

    FOLDER/canaries.jsonl holds the documents to add to a corpus as a domain, FOLDER/canaries.json,
    written last, describes all canaries and controls.

    Raises:
        DataError: The folder cannot be written.
    """
    lines = [
        json.dumps({"id": f"canary-{i}-{copy}", "text": c.text})
        for i, c in enumerate(canaries)
        for copy in range(c.repeats)
    ]
    random.Random(0).shuffle(lines)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "canaries.jsonl") as file:
            file.write("\n".join(lines) + "\n")
        with atomic_write(folder / "canaries.json") as file:
            json.dump([asdict(c) for c in canaries], file, indent=0)
    except OSError as error:
        raise DataError(
            f"{error.filename or folder} cannot be written: {error.strerror}"
        ) from error


def read_canaries(folder: Path) -> list[Canary]:
    """Read what `write_canaries` wrote. Raises DataError that names the file."""
    path = folder / "canaries.json"
    try:
        canaries = [
            Canary(str(c["text"]), int(c["repeats"]))
            for c in json.loads(path.read_text(encoding="utf-8"))
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); expected what `nextpt memorization plant {folder}`"
            " writes"
        ) from None
    for kind, count in (
        ("canary", sum(c.repeats > 0 for c in canaries)),
        ("control", sum(c.repeats == 0 for c in canaries)),
    ):
        if not count:
            raise DataError(f"{path} holds no {kind}; both are needed to compare")
    return canaries


def exposure(nats: float, controls: Sequence[float]) -> float:
    """Compute the exposure in bits from code lengths of a canary and of the controls."""
    rank = 1 + sum(c <= nats for c in controls)
    return math.log2(len(controls) + 1) - math.log2(rank)
