"""Plan of a preparation: its inputs cut into work units, independent of the number of workers.

WORK/plan.json is written once and read by every worker. A preparation that is started again
continues only when its settings and inputs (names, sizes, modification times) are those of the plan
that it finds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from data_prep.inputs import InputFile, find_inputs
from data_prep.records import Fields, Part, Record, read_part, row_groups, unpacked_size
from data_prep.spec import PrepSpec
from nextpt.base.errors import DataPrepError
from nextpt.base.files import atomic_write, canonical_json, sha256_file

# Bytes of text per unit: seconds of work, so little is lost by a kill or waited for at the end.
# Small files share a unit.
UNIT_BYTES = 2**25
# Raise it when the same inputs and settings give other shards.
PACKING_VERSION = 2
LISTING_THREADS = 16  # Parquet footers in an object store are latency, not work


@dataclass(frozen=True)
class Unit:
    """Work for one worker.

    Attributes:
        index: Number of the unit.
        source: Name that its corpus was given under.
        parts: Parts of files, in order.
        text: Bytes that they decompress to, approximately.
        tail_from: Characters of the unit before the held-out tail begins (split "tail" only).
    """

    index: int
    source: str
    parts: tuple[Part, ...]
    text: int
    tail_from: int | None = None

    @property
    def size(self) -> int:
        """Bytes as stored."""
        return sum(part.stored for part in self.parts)


@dataclass(frozen=True)
class Plan:
    """Settings and units; sha256 covers everything that the dataset is a function of."""

    spec: PrepSpec
    units: tuple[Unit, ...]
    sha256: str

    @property
    def fields(self) -> Fields:
        """Keys of the records."""
        return Fields(self.spec.text_field, self.spec.id_field, self.spec.domain_field)

    @property
    def size(self) -> int:
        """Bytes of all inputs as stored."""
        return sum(unit.size for unit in self.units)

    def save(self) -> None:
        """Write WORK/plan.json."""
        files = list(dict.fromkeys(part.file for unit in self.units for part in unit.parts))
        index = {file: i for i, file in enumerate(files)}
        value = {
            "sha256": self.sha256,
            "spec": json.loads(self.spec.model_dump_json()),
            "files": [[f.uri, f.name, f.size, f.stamp] for f in files],
            "units": [
                [
                    u.source,
                    u.text,
                    u.tail_from,
                    [[index[p.file], p.start, p.stop, p.stored] for p in u.parts],
                ]
                for u in self.units
            ],
        }
        self.spec.work.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.spec.work / "plan.json") as file:
            json.dump(value, file)

    @classmethod
    def load(cls, work: Path) -> Plan:
        """Read WORK/plan.json.

        Raises:
            DataPrepError: When it is not there or damaged.
        """
        path = work / "plan.json"
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            files = [InputFile(*entry) for entry in value["files"]]
            units = tuple(
                Unit(i, source, tuple(Part(files[f], *rest) for f, *rest in parts), text, tail_from)
                for i, (source, text, tail_from, parts) in enumerate(value["units"])
            )
            spec = value["spec"]
            if "heldout" in spec:  # written before format version 3
                spec["validation_fraction"] = spec.pop("heldout")
            return cls(PrepSpec.model_validate(spec), units, value["sha256"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataPrepError(
                f"{path} cannot be read: {error}; remove {work} and start again"
            ) from error


def make_plan(spec: PrepSpec) -> Plan:
    """List the inputs and cut them into units.

    Raises:
        DataPrepError: When settings or inputs are invalid.
        StoreError: When a store refuses.
    """
    spec.check()
    files = find_inputs(spec.domains)
    units: list[Unit] = []
    for name in sorted(files):
        units += [
            Unit(len(units) + i, name, parts, text)
            for i, (parts, text) in enumerate(_cut(files[name]))
        ]
    if spec.split == "tail":
        units = _find_tails(spec, units)
    return Plan(spec, tuple(units), _identity(spec, files))


def _identity(spec: PrepSpec, files: dict[str, list[InputFile]]) -> str:
    """Hash of settings and inputs; names are relative to their corpus, so that it may be moved.

    dataset.json records it, so the keys of the settings are hashed as they were first named.
    """
    inputs = {name: [[f.name, f.size, f.stamp] for f in listed] for name, listed in files.items()}
    chosen = _tokenizer_identity(spec.tokenizer) if spec.tokenizer else None
    settings = spec.settings()
    settings["heldout"] = settings.pop("validation_fraction")
    parts = [inputs, chosen, settings, PACKING_VERSION]
    return sha256(canonical_json(parts).encode()).hexdigest()


def _tokenizer_identity(source: str | Path) -> list[str]:
    path = Path(source)
    if not path.exists():
        return [str(source)]
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [sha256_file(f) for f in files if f.is_file()]


def _cut(files: list[InputFile]) -> Iterator[tuple[tuple[Part, ...], int]]:
    """Yield (parts, bytes of text) of units of about UNIT_BYTES.

    Parts are gathered in order until a unit is full.
    """
    gathered: list[Part] = []
    total = 0
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        for parts in pool.map(_parts, files):
            for part, size in parts:
                if gathered and total + size > UNIT_BYTES:
                    yield tuple(gathered), total
                    gathered, total = [], 0
                gathered.append(part)
                total += size
    if gathered:
        yield tuple(gathered), total


def _parts(file: InputFile) -> list[tuple[Part, int]]:
    """(part, bytes of text that it may hold) of each part of one file."""
    if file.format == ".parquet":
        sizes = row_groups(file)
        if sum(sizes) <= UNIT_BYTES:
            return [(Part(file, 0, len(sizes), file.size), sum(sizes))]
        return [
            (Part(file, i, i + 1, file.size * size // sum(sizes)), size)
            for i, size in enumerate(sizes)
        ]
    if file.compression or file.format == ".txt":
        return [(Part(file, 0, file.size, file.size), unpacked_size(file))]
    ranges = [
        (start, min(start + UNIT_BYTES, file.size))
        for start in range(0, max(file.size, 1), UNIT_BYTES)
    ]
    return [(Part(file, start, stop, stop - start), stop - start) for start, stop in ranges]


def _find_tails(spec: PrepSpec, units: list[Unit]) -> list[Unit]:
    """Units with the position at which the held-out tail of their source begins.

    Reads the whole corpus once: meant for corpora of one machine.
    """
    fields = Fields(spec.text_field, spec.id_field)
    lengths = [
        sum(
            len(r.text)
            for part in unit.parts
            for r in read_part(part, fields)
            if isinstance(r, Record)
        )
        for unit in units
    ]
    left = {
        name: int(
            sum(n for unit, n in zip(units, lengths, strict=True) if unit.source == name)
            * (1 - spec.validation_fraction)
        )
        for name in spec.domains
    }
    placed = []
    for unit, length in zip(units, lengths, strict=True):
        placed.append(replace(unit, tail_from=left[unit.source]))
        left[unit.source] = max(left[unit.source] - length, 0)
    return placed


def plan_sha256(spec: PrepSpec) -> str:
    """Identity of the plan of these settings and inputs, without reading the inputs."""
    spec.check()
    return _identity(spec, find_inputs(spec.domains))
