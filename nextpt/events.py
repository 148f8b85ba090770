"""What happened: the records a run emits, one JSON object a line in RUN/metrics.jsonl.

`time` is when, in seconds since 1970 on the clock of the first rank.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class StepEvent:
    """One logged optimizer step. loss: weighted nats per target. bpb: bits per byte of the step's text tokens.

    noise: the step's estimates of the gradient noise, {"trace": tr(S), "square": |G|^2}; average
    both over many steps before dividing (train/dynamics.py). None where a step is one micro-batch.
    update_ratios: kind of parameter -> |update| / |weights|.
    """

    step: int
    tokens: int
    loss: float
    bpb: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    z_loss: float = 0.0
    data_wait_seconds: float = 0.0
    memory_bytes: int = 0
    mfu: float | None = None
    noise: dict[str, float] | None = None
    update_ratios: dict[str, float] = field(default_factory=dict)
    domains: dict[str, dict[str, float]] = field(default_factory=dict)
    time: float = field(default_factory=time.time)
    kind: str = "train"


@dataclass(frozen=True)
class ValidationEvent:
    """Loss on held-out rows after `step` steps.

    `domains` holds figures per domain, `total` those of all.
    """

    step: int
    tokens: int
    domains: dict[str, dict[str, float]]
    total: dict[str, float]
    time: float = field(default_factory=time.time)
    kind: str = "validation"


@dataclass(frozen=True)
class CheckpointEvent:
    """A checkpoint became complete. seconds: from its begin. stall_seconds: those in which training stood still for it."""

    step: int
    path: str
    seconds: float
    bytes: int
    stall_seconds: float = 0.0
    time: float = field(default_factory=time.time)
    kind: str = "checkpoint"


@dataclass(frozen=True)
class SkipEvent:
    """A step that changed nothing: its loss (nats per token) or gradient norm was not finite, or a spike.

    in_row: bad steps in a row up to this one. skipped: in the whole run. Limits: those of a spike;
    None while none is looked for.
    """

    step: int
    reason: str
    loss: float
    grad_norm: float
    in_row: int
    skipped: int
    loss_limit: float | None = None
    grad_norm_limit: float | None = None
    time: float = field(default_factory=time.time)
    kind: str = "skip"


@dataclass(frozen=True)
class RollbackEvent:
    """Training went back to the checkpoint of `step`, over bad steps first_bad..last_bad.

    Records of later steps no longer hold.

    reason: of the last of them. first_sample, stop_sample: what is passed over, in the order of
    samples (docs/loader.md).
    rollbacks: how often so far without getting any further.
    """

    step: int
    first_bad: int
    last_bad: int
    reason: str
    first_sample: int
    stop_sample: int
    rollbacks: int
    time: float = field(default_factory=time.time)
    kind: str = "rollback"


@dataclass(frozen=True)
class SaveFailedEvent:
    """A checkpoint could not be written and training went on. rank: where. errno: the system's number. in_row: such saves in a row."""

    step: int
    message: str
    rank: int
    errno: int | None
    in_row: int
    time: float = field(default_factory=time.time)
    kind: str = "save_failed"


@dataclass(frozen=True)
class MirrorEvent:
    """The mirror of the checkpoints. status: "mirrored" (path: where.

    seconds, bytes: of its way there); "passed over": `step` will not be mirrored; "damaged": one
    there is not usable; "failing": the store does not take them now; "ended": mirroring is over.

    waiting: checkpoints that are still to be mirrored.
    """

    step: int
    status: str
    message: str = ""
    path: str = ""
    seconds: float = 0.0
    bytes: int = 0
    waiting: int = 0
    time: float = field(default_factory=time.time)
    kind: str = "mirror"


Event = (
    StepEvent
    | ValidationEvent
    | CheckpointEvent
    | SkipEvent
    | RollbackEvent
    | SaveFailedEvent
    | MirrorEvent
)


class Listener(Protocol):
    """Anything that wants to hear of events, in order, and to be told when no more will come."""

    def on_event(self, event: Event) -> None: ...

    def close(self) -> None: ...


def scalars(event: Event) -> dict[str, float]:
    """The numbers of an event under flat names (`train/loss`, `validation/code/bpb`, ...), for any tracker.

    Step and time are the axis and left out; so is what an event does not know (None).
    """
    found: dict[str, float] = {}

    def walk(prefix: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                walk(prefix if name == "domains" else f"{prefix}{name}/", value)
            elif isinstance(value, (int, float)):
                found[prefix + name] = float(value)

    walk(
        f"{event.kind}/",
        {k: v for k, v in asdict(event).items() if k not in ("step", "time", "kind")},
    )
    return found


class MetricsFile:
    """Appends events to metrics.jsonl. Scripts find the keys of a training record at the top level.

    Records of steps after `resume_step` are cut off first, and those after that of a rollback when
    it comes: those steps will be made again.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        self._cut(resume_step)

    def _cut(self, last_step: int) -> None:
        kept = [line for line in self._lines() if _step_of(line) <= last_step]
        temporary = self.path.with_suffix(".jsonl.tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def _lines(self) -> list[str]:
        if not self.path.exists():
            return []
        return [
            line
            for line in self.path.read_text(encoding="utf-8").splitlines()
            if _step_of(line) >= 0
        ]

    def on_event(self, event: Event) -> None:
        if isinstance(event, RollbackEvent):
            self._cut(event.step)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(event), sort_keys=True) + "\n")

    def close(self) -> None:
        """Every event is on its line already."""


# Metric names of files written before 2026-12, and what they are called now
RENAMED_METRICS = {"bpb_text": "bpb", "bpb_code": "bpb_with_eod"}


def rename_old_metrics(value: Any) -> Any:
    """Return a JSON value with the metric names of older files replaced by today's, at any depth."""
    if isinstance(value, dict):
        return {RENAMED_METRICS.get(k, k): rename_old_metrics(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rename_old_metrics(item) for item in value]
    return value


def read_events(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Read all records of a metrics file, or those of one kind, under today's metric names.

    A torn last line (of a killed run) is skipped.
    """
    if not path.exists():
        return []
    records = [
        rename_old_metrics(json.loads(line))
        for line in path.read_text(encoding="utf-8").splitlines()
        if _step_of(line) >= 0
    ]
    return [record for record in records if kind is None or record["kind"] == kind]


def _step_of(line: str) -> int:
    """Step of a line; -1 for one that is torn."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1
