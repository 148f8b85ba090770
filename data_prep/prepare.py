"""Preparation of a dataset folder from corpora, by any number of workers.

Unfinished work is in OUTPUT.work, beside the output: plan, tokenizer, tokens of every unit, packed
groups (data_prep.stages). A preparation that is killed at any instant and started again, with any
number of workers, continues with what is not done and ends with the same bytes. The finished folder
takes its name by a rename, so a dataset folder exists or does not.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from pathlib import Path

import orjson
from rich import box
from rich.console import Console
from rich.table import Table

from data_prep.encode import tokens_path
from data_prep.format import DatasetManifest
from data_prep.plan import Plan, make_plan, plan_sha256
from data_prep.spec import PrepSpec
from data_prep.watch import watching
from data_prep.workers import LocalWorkers, Workers
from nextpt.base.errors import DataPrepError, UserError


def prepare(
    spec: PrepSpec,
    *,
    overwrite: bool = False,
    console: Console | None = None,
    workers: Workers | None = None,
    alone: bool = True,
) -> DatasetManifest:
    """Write the dataset folder `spec.output` and return its manifest.

    An unchanged dataset is reused, and unfinished work is continued.

    Args:
        spec: Settings and inputs.
        overwrite: Replace a dataset, or drop unfinished work, of other inputs or settings.
        console: Where progress is shown.
        workers: Where to work; by default on the cores of this machine.
        alone: Whether no other process works on the same preparation, as tasks of a job array do.
            Then what failed before is tried again.

    Raises:
        DataPrepError: With file, line or key; the output is left as it was.
        StoreError: When a store refuses.
    """
    console = console or Console(quiet=True)
    plan = make_plan(spec)
    if not _is_to_do(plan, overwrite, console):
        return DatasetManifest.load(spec.output)
    try:
        _begin(plan, overwrite, console, alone)
        with watching(plan, console):
            (workers or local_workers(plan)).run(spec.work)
        shutil.rmtree(spec.work, ignore_errors=True)  # leases of workers that ended last
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataPrepError(
                f"no space left on the device of {spec.output.absolute().parent}; free some and"
                " start again"
            ) from error
        raise DataPrepError(
            f"{error.filename or spec.output}: {error.strerror or error}"
        ) from error
    return DatasetManifest.load(spec.output)


def local_workers(plan: Plan) -> LocalWorkers:
    """As many workers as this process may use cores, and no more than there are units."""
    return LocalWorkers(max(min(len(os.sched_getaffinity(0)), len(plan.units)), 1))


def is_current(spec: PrepSpec) -> bool:
    """Whether the output is a dataset made from the inputs and settings of `spec`."""
    try:
        return DatasetManifest.load(spec.output).inputs_sha256 == plan_sha256(spec)
    except UserError:
        return False


def _is_to_do(plan: Plan, overwrite: bool, console: Console) -> bool:
    """Whether there is anything to do: False when the output is there already.

    Raises:
        DataPrepError: When the output is something else and must not be replaced.
    """
    output = plan.spec.output
    if (output / "dataset.json").exists():
        try:
            existing = DatasetManifest.load(output).inputs_sha256
        except UserError:
            if not overwrite:
                raise
            return True
        if existing == plan.sha256:
            console.print(f"{output} is there and was made from the same inputs")
            return False
        if not overwrite:
            raise DataPrepError(
                f"{output} holds a dataset made from other inputs or settings; give another output"
                " or --overwrite"
            )
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataPrepError(f"{output} is there and is no dataset; give another output")
    return True


def _begin(plan: Plan, overwrite: bool, console: Console, alone: bool) -> None:
    """Write the plan, or continue with the one that is there."""
    work = plan.spec.work
    if (work / "plan.json").exists():
        existing = Plan.load(work)
        if existing.sha256 == plan.sha256:
            tokenized = sum(tokens_path(work, unit.index).exists() for unit in plan.units)
            if alone:
                console.print(
                    f"continuing {work}: {tokenized} of {len(plan.units)} units are tokenized"
                )
                shutil.rmtree(work / "failed", ignore_errors=True)
            return
        if not overwrite and any((work / "tok").glob("*.tok")):
            raise DataPrepError(
                f"{work} holds unfinished work on other inputs or settings; finish that, or drop it"
                " with --overwrite"
            )
    if work.exists() and alone:
        shutil.rmtree(work)
    plan.save()
    if plan.spec.vocab_size is not None:
        console.print(f"training a tokenizer of {plan.spec.vocab_size} tokens")


def quarantine_summary(output: Path) -> str:
    """One line: how many records of a dataset's inputs were quarantined, by reason, and where."""
    path = output / "quarantine.jsonl"
    if not path.is_file():
        return "quarantined records: 0"
    with open(path, "rb") as lines:
        reasons = Counter(orjson.loads(line)["reason"] for line in lines)
    shown = ", ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common())
    return f"quarantined records: {reasons.total():,} ({shown}); see {path}"


def summary_table(manifest: DatasetManifest) -> Table:
    """Documents, bytes, tokens, bytes per token and packing efficiency, per split and domain."""
    table = Table(
        title="dataset",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title_justify="left",
        padding=(0, 1, 0, 0),
    )
    table.add_column("split", no_wrap=True)
    table.add_column("domain", no_wrap=True)
    for heading in ("docs", "bytes", "tokens", "B/token", "sequences", "packing"):
        table.add_column(heading, justify="right", no_wrap=True)
    for split, domains in manifest.splits.items():
        for domain, c in domains.items():
            slots = c.sequences * (manifest.sequence_length + 1)
            table.add_row(
                split,
                domain,
                f"{c.documents:,}",
                f"{c.bytes:,}",
                f"{c.text_tokens:,}",
                f"{c.bytes / c.text_tokens:.2f}" if c.text_tokens else "-",
                f"{c.sequences:,}",
                f"{1 - c.padding_tokens / slots:.2%}" if slots else "-",
            )
    return table
