"""Duplicate documents: by the hash of their text, and by their id.

Hashes are divided among partitions by their remainder. So memory is bounded by PARTITION records
however many documents there are, and any number of workers can share the partitions. Of equal
documents the first, in the order of the plan, is kept. Equal means equal xxh64, and for texts equal
length too: among 10^9 documents one false pair is expected with a probability of 3 % for ids and
far less for texts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_prep.encode import Advance, tokens_path
from data_prep.tokens import TokensFile, read_footer
from nextpt.base.files import atomic_write

PARTITION = 2**23  # records; 24 bytes each, and as much again while sorting
TOP = 20  # repeated texts that the report shows
PLACE = np.dtype([("unit", "<u4"), ("document", "<u4")])
KEYED = np.dtype([("hash", "<u8"), ("bytes", "<u4"), ("unit", "<u4"), ("document", "<u4")])
OFTEN = np.dtype([("count", "<u8"), ("bytes", "<u4"), ("unit", "<u4"), ("document", "<u4")])


def partitions(work: Path, units: int) -> int:
    """Number of partitions that the documents of all units need."""
    documents = sum(int(read_footer(tokens_path(work, unit))["documents"]) for unit in range(units))
    return max(1, -(-documents // PARTITION))


def duplicates_path(work: Path, partition: int) -> Path:
    """Result of a partition, which exists when the partition is done."""
    return work / "duplicates" / f"{partition:05d}.npz"


def find_duplicates(
    work: Path, units: int, partition: int, count: int, advance: Advance = lambda n: None
) -> None:
    """Write the duplicate texts and ids among the documents of one of `count` partitions."""
    keys: dict[str, list[np.ndarray]] = {"text": [], "id": []}
    for unit in range(units):
        documents = TokensFile(tokens_path(work, unit)).documents
        for name, hashes in (("text", documents["text_hash"]), ("id", documents["id_hash"])):
            own = np.flatnonzero(hashes % np.uint64(count) == partition)
            own = own[hashes[own] > 0] if name == "id" else own
            keyed = np.empty(len(own), dtype=KEYED)
            keyed["hash"], keyed["unit"], keyed["document"] = hashes[own], unit, own
            keyed["bytes"] = documents["bytes"][own] if name == "text" else 0
            keys[name].append(keyed)
        advance(1)
    texts, often = _later(np.concatenate(keys["text"] or [np.empty(0, KEYED)]))
    ids, _ = _later(np.concatenate(keys["id"] or [np.empty(0, KEYED)]))
    path = duplicates_path(work, partition)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "wb") as file:
        np.savez(file, texts=texts, ids=ids, often=often)


def _later(keyed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(all places of each key but the first, in order; the TOP most frequent keys)."""
    order = np.lexsort((keyed["document"], keyed["unit"], keyed["bytes"], keyed["hash"]))
    keyed = keyed[order]
    new = np.ones(len(keyed), dtype=bool)
    new[1:] = (keyed["hash"][1:] != keyed["hash"][:-1]) | (
        keyed["bytes"][1:] != keyed["bytes"][:-1]
    )
    starts = np.flatnonzero(new)
    counts = np.diff(np.append(starts, len(keyed)))
    top = np.argsort(-counts, kind="stable")[:TOP]
    top = top[counts[top] > 1]
    often = np.empty(len(top), dtype=OFTEN)
    often["count"] = counts[top]
    for name in ("bytes", "unit", "document"):
        often[name] = keyed[name][starts[top]]
    places = np.empty(int((~new).sum()), dtype=PLACE)
    places["unit"], places["document"] = keyed["unit"][~new], keyed["document"][~new]
    return np.sort(places, order=("unit", "document")), often


class Duplicates:
    """Results of all partitions.

    Attributes:
        texts: PLACE records of documents whose text came before, in order.
        ids: PLACE records of documents whose id came before, in order.
        often: OFTEN records of the most frequent texts.
    """

    def __init__(self, work: Path, count: int) -> None:
        parts = []
        for partition in range(count):
            with np.load(duplicates_path(work, partition)) as arrays:
                parts.append({name: arrays[name] for name in arrays.files})
        self.texts, self.ids = (
            np.sort(np.concatenate([p[name] for p in parts]), order=("unit", "document"))
            for name in ("texts", "ids")
        )
        often = np.concatenate([p["often"] for p in parts])
        self.often = often[
            np.lexsort((often["document"], often["unit"], -often["count"].astype(np.int64)))
        ][:TOP]

    def of_unit(self, which: str, unit: int) -> np.ndarray:
        """Documents of a unit that repeat an earlier text ("texts") or id ("ids"), in order."""
        places: np.ndarray = getattr(self, which)
        low, high = np.searchsorted(places["unit"], (unit, unit + 1))
        return np.asarray(places["document"][low:high])
