"""Collection of a finished preparation's figures into its report."""

from __future__ import annotations

import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orjson

from data_prep.choice import encoder_reason
from data_prep.duplicates import Duplicates
from data_prep.encode import tokens_path
from data_prep.format import SPLITS, DatasetManifest
from data_prep.layout import Layout, describe_position, quarantined
from data_prep.plan import Plan
from data_prep.report import (
    BadRecord,
    DuplicateText,
    InputReport,
    PrepReport,
    Quarantined,
    SplitReport,
    Throughput,
    TokenizerReport,
    write_report,
)
from data_prep.report import Duplicates as DuplicatesReport
from data_prep.tokenizer import Tokenizer
from data_prep.tokens import TokensFile, read_footer

EXAMPLES = 3  # of each kind of bad record
EXCERPT_TOKENS = 48  # of a repeated text


def summarise(
    plan: Plan,
    layout: Layout,
    tokenizer: Tokenizer,
    duplicates: Duplicates,
    manifest: DatasetManifest,
    packed: list[dict[str, Any]],
    folder: Path,
    wall_seconds: float,
) -> None:
    """Write folder/report.json and folder/report.html.

    Args:
        plan: The plan.
        layout: The layout.
        tokenizer: The tokenizer.
        duplicates: Results of the duplicates stage.
        manifest: Manifest of the finished dataset.
        packed: Counts of the groups, see data_prep.group.packed_path.
        folder: Folder to write to.
        wall_seconds: Wall-clock time of the preparation.
    """
    spec = plan.spec
    splits = [
        _split(split, domain, manifest, layout, packed)
        for split in SPLITS
        for domain in layout.domains
    ]
    settings = spec.settings() | {"unit_count": len(plan.units), "group_count": len(layout.groups)}
    write_report(
        PrepReport(
            name=spec.output.name,
            fingerprint=manifest.fingerprint,
            version=_version(),
            finished=time.time(),
            sequence_length=spec.sequence_length,
            documents_read=layout.counts["records"],
            splits=splits,
            duplicates=_duplicates(plan, layout, tokenizer, duplicates),
            filtered=layout.counts["filtered"],
            quarantined=_quarantine(plan, duplicates, layout),
            throughput=_throughput(plan, layout, packed, wall_seconds),
            tokenizer=TokenizerReport(
                name=_tokenizer_name(plan),
                kind=tokenizer.kind,
                vocab_size=tokenizer.vocab_size,
                sha256=tokenizer.sha256,
                encoder=tokenizer.encoder,
                reason=encoder_reason(spec.work),
            ),
            settings=settings,
            inputs=_inputs(plan),
        ),
        folder,
    )


def _split(
    split: str, domain: str, manifest: DatasetManifest, layout: Layout, packed: list[dict[str, Any]]
) -> SplitReport:
    groups = [
        group[split]
        for group, planned in zip(packed, layout.groups, strict=True)
        if planned.domain == domain
    ]
    counts = manifest.splits[split][domain]
    return SplitReport(
        split=split,
        domain=domain,
        **counts.model_dump(exclude={"max_segments", "index_sha256"}),
        slots=counts.sequences * (manifest.sequence_length + 1),
        pieces=sum(f["pieces"] for f in groups),
        cut_documents=sum(f["cut_documents"] for f in groups),
        length_histogram=[
            sum(column) for column in zip(*(f["histogram"] for f in groups), strict=True)
        ],
    )


def _duplicates(
    plan: Plan, layout: Layout, tokenizer: Tokenizer, duplicates: Duplicates
) -> DuplicatesReport:
    size = 0
    for unit in sorted(set(duplicates.texts["unit"].tolist())):
        documents = TokensFile(tokens_path(plan.spec.work, unit)).documents
        size += int(documents["bytes"][duplicates.of_unit("texts", unit)].sum(dtype="int64"))
    return DuplicatesReport(
        documents=len(duplicates.texts),
        bytes=size,
        dropped=plan.spec.duplicates == "drop",
        top=[_often(plan, tokenizer, entry) for entry in duplicates.often],
        duplicate_ids=len(duplicates.ids),
    )


def _often(plan: Plan, tokenizer: Tokenizer, entry: Any) -> DuplicateText:
    """A frequent text, read back at its first occurrence."""
    unit = plan.units[int(entry["unit"])]
    file = TokensFile(tokens_path(plan.spec.work, unit.index))
    document = file.documents[int(entry["document"])]
    start = int(file.documents["tokens"][: int(entry["document"])].sum(dtype="int64"))
    tokens = file.tokens[start : start + min(int(document["tokens"]), EXCERPT_TOKENS)]
    source = unit.parts[int(document["part"])].file.uri
    position = describe_position({"file": source, "position": int(document["position"])})
    return DuplicateText(
        count=int(entry["count"]),
        bytes=int(entry["bytes"]),
        excerpt=tokenizer.decode(tokens),
        id=f"{source}, {position}",
    )


def _quarantine(plan: Plan, duplicates: Duplicates, layout: Layout) -> dict[str, Quarantined]:
    examples: dict[str, list[BadRecord]] = {reason: [] for reason in layout.counts["bad"]}
    for unit in plan.units:
        for line in quarantined(plan, duplicates, unit):
            entry = orjson.loads(line)
            if len(examples[entry["reason"]]) < EXAMPLES:
                examples[entry["reason"]].append(
                    BadRecord(
                        file=entry["file"],
                        position=describe_position(entry),
                        detail=entry["detail"],
                    )
                )
    return {
        reason: Quarantined(records=layout.counts["bad"][reason], examples=records)
        for reason, records in examples.items()
    }


def _throughput(
    plan: Plan, layout: Layout, packed: list[dict[str, Any]], wall_seconds: float
) -> Throughput:
    counts = layout.counts
    packing = sum(group["seconds"] for group in packed)
    workers = {
        read_footer(tokens_path(plan.spec.work, unit.index))["worker"] for unit in plan.units
    }
    return Throughput(
        workers=len(workers),
        wall_seconds=wall_seconds,
        cpu_seconds=counts["seconds"] + packing,
        bytes=counts["bytes"],
        input_bytes=plan.size,
        tokens=counts["tokens"],
        stage_seconds={
            "tokenize": counts["encoding_seconds"],
            "read, check and store": counts["seconds"] - counts["encoding_seconds"],
            "pack and write": packing,
        },
    )


def _inputs(plan: Plan) -> list[InputReport]:
    reports = []
    for name, location in plan.spec.domains.items():
        files = {part.file for unit in plan.units if unit.source == name for part in unit.parts}
        reports.append(
            InputReport(
                domain=name,
                location=str(location),
                files=len(files),
                bytes=sum(f.size for f in files),
            )
        )
    return reports


def _tokenizer_name(plan: Plan) -> str:
    spec = plan.spec
    if spec.tokenizer is not None:
        return Path(spec.tokenizer).name
    return "the characters of the corpus" if spec.characters else "trained on the corpus"


def _version() -> str:
    try:
        return version("nextpt")
    except PackageNotFoundError:
        return "unknown"
