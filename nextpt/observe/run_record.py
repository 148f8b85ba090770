"""Everything that a run folder tells, read into one record.

Reads only; a folder of a run under way is fine.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nextpt.base.errors import DataError
from nextpt.checkpoint.folders import checkpoint_folders, step_of
from nextpt.checkpoint.manifest import MANIFEST, manifest_problem, read_manifest
from nextpt.config import BatchSchedule, Config, load_config
from nextpt.events import decided_batches, read_events, rename_old_keys
from nextpt.job.environment import read_starts
from nextpt.model import ModelSpec, count


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        label: Name in plots and tables.
        folder: The run folder.
        config: Its config.
        train: Training events of metrics.jsonl, in order of step.
        validation: Validation events of metrics.jsonl, in order of step.
        evaluation: Content of evaluation.json, or None.
        samples: Content of samples.json.
        starts: Records of the starts.
        checkpoints: The checkpoints.
        batches: Batch size by step, with the decisions of train.batch_growth.
        notes: What could not be read.
    """

    label: str
    folder: Path
    config: Config
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    samples: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    checkpoints: list[dict[str, Any]]
    batches: BatchSchedule
    notes: list[str] = field(default_factory=list)

    @property
    def last(self) -> dict[str, Any]:
        """The last training event."""
        return self.train[-1]

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return count(ModelSpec.from_config(self.config)).parameters

    def batch_tokens(self) -> list[int]:
        """Return the tokens of each logged step."""
        length = self.config.data.sequence_length
        return [self.batches.batch_size(event["step"] - 1) * length for event in self.train]

    @property
    def status(self) -> str:
        """Progress of the run."""
        step, total = self.last["step"], self.config.total_steps_with(self.batches)
        if step >= total:
            return "complete"
        return f"at step {step:,} of {total:,} ({step / total:.0%})"

    def seconds(self) -> float:
        """Return the time of logged steps, without pauses, validation and checkpoints."""
        total, before = 0.0, 0
        for event in self.train:
            total += (event["tokens"] - before) / event["tokens_per_second"]
            before = event["tokens"]
        return total

    def median_rate(self) -> float:
        """Return the median tokens per second of the logged steps."""
        return float(statistics.median(event["tokens_per_second"] for event in self.train))


def read_runs(folders: list[Path]) -> list[RunRecord]:
    """Read run folders, in the order given.

    Raises DataError that names the folder and what it lacks.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise DataError("a run folder is given twice; give each once")
    names = [folder.resolve().name for folder in folders]
    return [
        _read(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def _read(folder: Path, label: str) -> RunRecord:
    if not folder.is_dir():
        raise DataError(f"run folder {folder} does not exist")
    if not (folder / "config.yaml").is_file():
        raise DataError(f"{folder} is not a run folder: it has no config.yaml")
    config = load_config(folder / "config.yaml", warn_deprecated=False)
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in read_events(folder / "metrics.jsonl"):
        by_kind[record["kind"]].append(record)
    train = by_kind["train"]
    if not train:
        raise DataError(
            f"{folder} has no logged step yet (metrics.jsonl); train first, with trackers.jsonl on"
        )
    return RunRecord(
        label=label,
        folder=folder,
        config=config,
        train=train,
        validation=by_kind["validation"],
        evaluation=_json(folder / "evaluation.json"),
        samples=_json(folder / "samples.json") or [],
        starts=read_starts(folder),
        checkpoints=_checkpoints(folder / "checkpoints"),
        batches=decided_batches(config.batches, by_kind["batch"]),
        notes=_notes(train, by_kind["skip"], by_kind["rollback"]),
    )


def _json(path: Path) -> Any:
    """Read a JSON file under today's metric names; None if it does not exist. Raises DataError."""
    if not path.exists():
        return None
    try:
        return rename_old_keys(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; remove it or write it again") from error


def _checkpoints(root: Path) -> list[dict[str, Any]]:
    """Return step, bytes, time and state of each checkpoint, oldest first.

    Sizes are checked, hashes are not.
    """
    entries = []
    for folder in reversed(checkpoint_folders(root)):
        problem = manifest_problem(folder)
        entry: dict[str, Any] = {"step": step_of(folder), "folder": str(folder), "problem": problem}
        if problem is None:
            manifest = read_manifest(folder)
            entry |= {
                "bytes": manifest.bytes,
                "files": len(manifest.files),
                "time": (folder / MANIFEST).stat().st_mtime,
            }
        entries.append(entry)
    return entries


def _notes(
    train: list[dict[str, Any]], skips: list[dict[str, Any]], rollbacks: list[dict[str, Any]]
) -> list[str]:
    """Return warnings for the reader of a report."""
    notes = []
    lost = [e["step"] for e in train if not math.isfinite(e["loss"])]
    if lost:
        notes.append(
            f"{len(lost)} logged steps have a loss that is not finite, the first is step"
            f" {lost[0]:,}"
        )
    if skips:
        reasons = ", ".join(
            f"{count} {reason}"
            for reason, count in sorted(Counter(e["reason"] for e in skips).items())
        )
        notes.append(
            f"{len(skips)} steps were skipped by the guard ({reasons}), the first is step"
            f" {skips[0]['step']:,}"
        )
    for event in rollbacks:
        notes.append(
            f"rolled back to step {event['step']:,} after bad steps {event['first_bad']:,} to"
            f" {event['last_bad']:,} ({event['reason']}); sequences {event['first_sequence']:,} to"
            f" {event['stop_sequence'] - 1:,} were skipped"
        )
    return notes
