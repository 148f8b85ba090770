"""Groups of documents that are packed together: one domain each, in the order of the plan.

Groups are a function of what the units hold, so they do not depend on the workers. Before any group
is packed, the share of bad records is checked: WORK/layout.json exists when the corpus is good
enough to continue.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from data_prep.duplicates import Duplicates
from data_prep.encode import tokens_path
from data_prep.plan import Plan, Unit
from data_prep.tokens import TokensFile, read_footer
from nextpt.base.errors import DataPrepError
from nextpt.base.files import atomic_write

# Tokens packed at once: 128 or 256 MiB, with little padding (about a sequence per group and split)
GROUP_TOKENS = 2**26


@dataclass(frozen=True)
class Group:
    """Documents of one domain from `start` (unit, document) up to `stop`, in the order of the plan.

    tokens is an estimate.
    """

    index: int
    domain: str
    start: tuple[int, int]
    stop: tuple[int, int]
    tokens: int


@dataclass(frozen=True)
class Layout:
    """Domains in order, groups, and the counts of records over all units."""

    domains: list[str]
    groups: list[Group]
    counts: dict[str, Any]

    @classmethod
    def load(cls, work: Path) -> Layout:
        """Read WORK/layout.json."""
        value = json.loads(layout_path(work).read_text(encoding="utf-8"))
        groups = [
            Group(i, domain, tuple(start), tuple(stop), tokens)
            for i, (domain, start, stop, tokens) in enumerate(value["groups"])
        ]
        counts = value["counts"]
        if "passed" in counts:  # written before format version 3
            counts["filtered"] = counts.pop("passed")
        return cls(value["domains"], groups, counts)


def layout_path(work: Path) -> Path:
    """WORK/layout.json, which exists when the layout stage is done."""
    return work / "layout.json"


def make_layout(plan: Plan, duplicates: Duplicates) -> None:
    """Write WORK/layout.json.

    Raises:
        DataPrepError: When too many records are bad or a domain has nothing to train on.
    """
    work = plan.spec.work
    footers = [read_footer(tokens_path(work, unit.index)) for unit in plan.units]
    counts = _counts(plan, footers, duplicates)
    _check_bad(plan, duplicates, counts)
    with_records = {domain for footer in footers for domain in footer["totals"]}
    domains = sorted(
        with_records if plan.spec.domain_field else with_records | set(plan.spec.domains)
    )
    for domain in domains or list(plan.spec.domains):
        totals = [footer["totals"].get(domain, [0, 0, 0, 0]) for footer in footers]
        if sum(t[0] - t[3] for t in totals) == 0:
            inputs = plan.spec.domains.get(domain, ", ".join(map(str, plan.spec.domains.values())))
            raise DataPrepError(
                f"domain {domain} ({inputs}) has no document to train on: it is empty, or all were"
                " held out"
            )
    groups = [[domain, *group] for domain in domains for group in _groups(domain, footers, work)]
    with atomic_write(layout_path(work)) as file:
        json.dump({"domains": domains, "groups": groups, "counts": counts}, file)


def _counts(plan: Plan, footers: list[dict[str, Any]], duplicates: Duplicates) -> dict[str, Any]:
    """Sum the counts over the units; asserts that no record was lost."""
    filtered: Counter[str] = Counter()
    bad: Counter[str] = Counter()
    for footer in footers:
        filtered.update(footer["filtered"])
        bad.update(footer["bad"])
    records, documents, cuts = (
        sum(footer[key] for footer in footers) for key in ("records", "documents", "cuts")
    )
    if records + cuts != documents + filtered.total() + bad.total():
        raise RuntimeError(f"{records} records became {documents}, {filtered}, {bad}")
    repeated = len(duplicates.texts)
    if plan.spec.duplicates == "drop":
        filtered["repeats an earlier text"] = repeated
    if clashes := sum(len(clashing_ids(duplicates, unit)) for unit in range(len(footers))):
        bad["repeated id"] = clashes
    return {
        "records": records,
        "cuts": cuts,
        "filtered": dict(filtered),
        "bad": dict(bad),
        "repeated": repeated,
        "bytes": sum(t[2] for footer in footers for t in footer["totals"].values()),
        "tokens": sum(footer["tokens"] for footer in footers),
        "seconds": sum(footer["seconds"] for footer in footers),
        "encoding_seconds": sum(footer["encoding_seconds"] for footer in footers),
    }


def clashing_ids(duplicates: Duplicates, unit: int) -> np.ndarray:
    """Documents of a unit that have the id of an earlier document with another text.

    A record that is repeated as a whole is a duplicate, not a clash.
    """
    return np.setdiff1d(duplicates.of_unit("ids", unit), duplicates.of_unit("texts", unit))


def dropped(plan: Plan, duplicates: Duplicates, unit: int) -> np.ndarray:
    """Documents of a unit that are left out of the dataset."""
    clashes = clashing_ids(duplicates, unit)
    return (
        np.union1d(clashes, duplicates.of_unit("texts", unit))
        if plan.spec.duplicates == "drop"
        else clashes
    )


def _check_bad(plan: Plan, duplicates: Duplicates, counts: dict[str, Any]) -> None:
    bad, records = sum(counts["bad"].values()), counts["records"]
    if bad <= plan.spec.max_bad_fraction * records:
        return
    path = plan.spec.work / "quarantine.jsonl"
    with atomic_write(path, "wb") as file:
        file.writelines(line for unit in plan.units for line in quarantined(plan, duplicates, unit))
    first = orjson.loads(
        next(line for unit in plan.units for line in quarantined(plan, duplicates, unit))
    )
    reasons = ", ".join(f"{reason}: {count}" for reason, count in counts["bad"].items())
    raise DataPrepError(
        f"{bad} of {records} records are bad, more than max_bad_fraction ="
        f" {plan.spec.max_bad_fraction} allows ({reasons}); the first: {first['file']},"
        f" {describe_position(first)}: {first['reason']}{': ' * bool(first['detail'])}"
        f"{first['detail']}. All of them: {path}. Fix them, or allow more"
    )


def describe_position(entry: dict[str, Any]) -> str:
    """Position of a quarantined record, for a message."""
    return (
        f"row {entry['position']}"
        if entry["file"].endswith(".parquet")
        else f"byte {entry['position']}"
    )


def quarantined(plan: Plan, duplicates: Duplicates, unit: Unit) -> Iterator[bytes]:
    """Yield a JSON line for each bad record of a unit: file, position, reason, detail, id."""
    path = tokens_path(plan.spec.work, unit.index)
    with open(path.with_suffix(".bad.jsonl"), "rb") as file:
        for line in file:
            entry = orjson.loads(line)
            if "place" in entry:  # written before format version 3
                entry["position"] = entry.pop("place")
                line = orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE)
            yield line
    clashes = clashing_ids(duplicates, unit.index)
    for document in TokensFile(path).documents[clashes] if len(clashes) else ():
        entry = {
            "file": unit.parts[document["part"]].file.uri,
            "position": int(document["position"]),
            "reason": "repeated id",
            "detail": (
                f"an earlier record has its {plan.spec.id_field}; where that key is not unique,"
                " choose another with --id-field"
            ),
            "id": None,
        }
        yield orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE)


def _groups(
    domain: str, footers: list[dict[str, Any]], work: Path
) -> Iterator[tuple[tuple[int, int], tuple[int, int], int]]:
    """Yield (start, stop, tokens) of the groups of a domain.

    A unit larger than a group is divided by documents.
    """
    start, gathered = (0, 0), 0
    for unit, footer in enumerate(footers):
        documents, tokens, *_ = footer["totals"].get(domain, [0, 0, 0, 0])
        tokens += 2 * documents  # start and end
        if gathered and gathered + tokens > GROUP_TOKENS:
            yield start, (unit, 0), gathered
            start, gathered = (unit, 0), 0
        if tokens > GROUP_TOKENS:
            for document, size in _cuts(domain, footer, work, unit):
                yield start, (unit, document), size
                start, tokens = (unit, document), tokens - size
        gathered += tokens
    if gathered:
        yield start, (len(footers), 0), gathered


def _cuts(domain: str, footer: dict[str, Any], work: Path, unit: int) -> Iterator[tuple[int, int]]:
    """Yield (document to cut before, tokens before it) for every full group inside one unit."""
    documents = TokensFile(tokens_path(work, unit)).documents
    own = np.where(
        documents["domain"] == footer["domains"].index(domain),
        documents["tokens"].astype(np.int64) + 2,
        0,
    )
    ends = np.cumsum(own)
    before = 0
    while ends[-1] - before > GROUP_TOKENS:
        document = max(
            int(np.searchsorted(ends, before + GROUP_TOKENS, side="right")),
            int(np.searchsorted(ends, before, side="right")) + 1,
        )
        yield document, int(ends[document - 1]) - before
        before = int(ends[document - 1])
