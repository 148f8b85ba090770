"""Last stage of a preparation: indices, manifest, held-out documents, quarantine and report.

Then the finished folder takes its name.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from data_prep.duplicates import Duplicates
from data_prep.encode import tokens_path, validation_path
from data_prep.format import SPLITS, DatasetManifest, SplitCounts, token_dtype
from data_prep.group import group_name, read_packed
from data_prep.layout import Layout, dropped, quarantined
from data_prep.plan import Plan
from data_prep.summary import summarise
from data_prep.tokenizer import Tokenizer
from data_prep.tokens import TokensFile
from nextpt.base.errors import DataPrepError, UserError
from nextpt.base.files import atomic_write, canonical_json, sha256_file


def is_finished(plan: Plan) -> bool:
    """Whether the output is the dataset of this plan."""
    try:
        return DatasetManifest.load(plan.spec.output).inputs_sha256 == plan.sha256
    except UserError:
        return False


def finish(
    plan: Plan, layout: Layout, tokenizer: Tokenizer, duplicates: Duplicates, wall_seconds: float
) -> None:
    """Assemble the dataset in WORK/dataset, rename it to the output, and remove WORK.

    Asserts that every record of the units is in the shards, in the quarantine, or counted as
    filtered.
    """
    spec, folder = plan.spec, plan.spec.work / "dataset"
    for leftover in folder.rglob(".*.tmp-*"):
        leftover.unlink(missing_ok=True)  # left by a worker that was killed in this stage
    packed = [read_packed(spec.work, group.index) for group in layout.groups]
    _rename_split(folder)
    counts = {
        split: {d: _write_index(folder, split, d, layout, packed) for d in layout.domains}
        for split in SPLITS
    }
    _check_sums(plan, layout, duplicates, counts)
    shutil.copyfile(tokenizer.path, folder / "tokenizer.json")
    with atomic_write(folder / "token_bytes.npy", "wb") as file:
        np.save(file, tokenizer.token_bytes())
    _write_validation_text(plan, layout, duplicates, folder / "validation_text")
    _write_quarantine(plan, duplicates, folder / "quarantine.jsonl")
    manifest = _manifest(plan, layout, tokenizer, folder, counts)
    summarise(plan, layout, tokenizer, duplicates, manifest, packed, folder, wall_seconds)
    with atomic_write(folder / "dataset.json") as file:
        file.write(canonical_json(manifest.model_dump()))
    _take_name(folder, spec.output)
    shutil.rmtree(spec.work, ignore_errors=True)


def _rename_split(folder: Path) -> None:
    """Move the groups that were packed before format version 3 to the split's new name."""
    for group in sorted((folder / "heldout").glob("*/*")):
        target = folder / "validation" / group.relative_to(folder / "heldout")
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(group, target)
    shutil.rmtree(folder / "heldout", ignore_errors=True)


def _write_index(
    folder: Path, split: str, domain: str, layout: Layout, packed: list[dict[str, Any]]
) -> SplitCounts:
    """Write one index.json over all groups of a domain; return the domain's counts."""
    shards = []
    most = 0
    sums = dict.fromkeys(
        ("documents", "bytes", "tokens", "text_tokens", "sequences", "padding_tokens"), 0
    )
    for group, counts_of_group in zip(layout.groups, packed, strict=True):
        if group.domain != domain:
            continue
        for key in sums:
            sums[key] += counts_of_group[split][key]
        most = max(most, counts_of_group[split]["max_segments"])
        for shard in counts_of_group[split]["shards"]:
            for data in (shard["raw_data"], shard["zip_data"]):
                if data:
                    data["basename"] = f"{group_name(group.index)}/{data['basename']}"
            stored = shard["zip_data"] or shard["raw_data"]
            path = folder / split / domain / stored["basename"]
            if not path.is_file() or path.stat().st_size != stored["bytes"]:
                raise DataPrepError(
                    f"{path} is not as it was packed; remove {folder.parent} and start again"
                )
            shards.append(shard)
    if not shards:
        return SplitCounts(**sums, max_segments=0, index_sha256="")
    index = folder / split / domain / "index.json"
    with atomic_write(index) as file:
        json.dump({"version": 2, "shards": shards}, file, sort_keys=True)
    return SplitCounts(**sums, max_segments=most, index_sha256=sha256_file(index))


def _check_sums(
    plan: Plan, layout: Layout, duplicates: Duplicates, counts: dict[str, dict[str, SplitCounts]]
) -> None:
    """Check that counts in = counts out + filtered + quarantined.

    A difference is a defect of the program; then nothing is written.
    """
    totals = layout.counts
    documents = sum(c.documents for domains in counts.values() for c in domains.values())
    out = documents + sum(totals["filtered"].values()) + sum(totals["bad"].values())
    if out != totals["records"] + totals["cuts"]:
        raise RuntimeError(f"{totals['records']} records in, {out} out")
    written = sum(c.tokens for domains in counts.values() for c in domains.values())
    kept = 0
    for unit in plan.units:
        lengths = TokensFile(tokens_path(plan.spec.work, unit.index)).documents["tokens"]
        kept += int(np.delete(lengths, dropped(plan, duplicates, unit.index)).sum(dtype=np.int64))
    if written != kept + documents:
        raise RuntimeError(f"{kept} tokens in, {written - documents} out, and {documents} ends")


def _write_validation_text(
    plan: Plan, layout: Layout, duplicates: Duplicates, folder: Path
) -> None:
    """Write validation_text/DOMAIN.jsonl from those of the units, without dropped documents."""
    folder.mkdir(exist_ok=True)
    with ExitStack() as stack:
        files = {
            d: stack.enter_context(atomic_write(folder / f"{d}.jsonl", "wb"))
            for d in layout.domains
        }
        for unit in plan.units:
            path = tokens_path(plan.spec.work, unit.index)
            tokens = TokensFile(path)
            gone = set(dropped(plan, duplicates, unit.index).tolist())
            with open(validation_path(path), "rb") as lines:
                for line in lines:
                    entry = orjson.loads(line)
                    number = entry.pop("doc")
                    if number not in gone:
                        domain = tokens.footer["domains"][tokens.documents["domain"][number]]
                        files[domain].write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))


def _write_quarantine(plan: Plan, duplicates: Duplicates, path: Path) -> None:
    """Write quarantine.jsonl: the bad records of all units, clashes of ids included.

    Writes no file when there are none.
    """
    path.unlink(missing_ok=True)
    lines = [line for unit in plan.units for line in quarantined(plan, duplicates, unit)]
    if lines:
        with atomic_write(path, "wb") as file:
            file.writelines(lines)


def _manifest(
    plan: Plan,
    layout: Layout,
    tokenizer: Tokenizer,
    folder: Path,
    counts: dict[str, dict[str, SplitCounts]],
) -> DatasetManifest:
    spec = plan.spec
    manifest = DatasetManifest(
        sequence_length=spec.sequence_length,
        vocab_size=tokenizer.vocab_size,
        token_dtype=token_dtype(tokenizer.vocab_size).name,
        tokenizer_sha256=tokenizer.sha256,
        token_bytes_sha256=sha256_file(folder / "token_bytes.npy"),
        start_id=tokenizer.start_id,
        end_id=tokenizer.end_id,
        packing=spec.packing,
        byte_counts=tokenizer.byte_counts,
        seed=spec.seed,
        validation_fraction=spec.validation_fraction,
        inputs_sha256="",
        domains=layout.domains,
        splits=counts,
        fingerprint="",
    )
    return manifest.model_copy(
        update={"fingerprint": manifest.content_sha256(), "inputs_sha256": plan.sha256}
    )


def _take_name(folder: Path, output: Path) -> None:
    """Rename the finished folder to the output.

    A dataset that it replaces is removed after the new one is whole.
    """
    old = output.with_name(f"{output.name}.old-{os.getpid()}")
    if output.exists():
        os.rename(output, old)
    os.rename(folder, output)
    shutil.rmtree(old, ignore_errors=True)
