"""Events: what a run publishes, one JSON object per line in RUN/metrics.jsonl.

`time` is seconds since 1970 by rank 0's clock. `step` is the number of completed optimizer steps.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nextpt.config import BatchSchedule


@dataclass(frozen=True)
class StepEvent:
    """Metrics of one logged optimizer step.

    Attributes:
        step: Number of completed steps, this one included.
        tokens: Number of tokens of all those steps.
        loss: Weighted loss without z-loss, nats per target.
        bpb: Bits per byte of the step's text tokens.
        lr: Learning rate of the step.
        grad_norm: Norm of the gradient before clipping.
        tokens_per_second: Over the steps since the last logged one.
        z_loss: Nats per target.
        data_wait_seconds: Seconds in which steps waited for batches since the last logged one.
        memory_bytes: Peak of the allocator on a GPU, resident memory of rank 0 on a CPU.
        mfu: Model FLOP utilisation, None where the peak of the device is unknown.
        noise: Estimates of the gradient noise, {"trace": tr(S), "square": |G|^2}; average both over
            many steps before dividing (train/dynamics.py). None where a step is one micro-batch.
        update_ratios: |update| / |weights| by kind of parameter.
        auxiliary_losses: Auxiliary losses of the model by name, nats per target.
        domains: Loss and bits per byte by domain.
        batch_size: Sequences of the step, over all ranks; 0 in records of before 2026-12.
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
    auxiliary_losses: dict[str, float] = field(default_factory=dict)
    domains: dict[str, dict[str, float]] = field(default_factory=dict)
    batch_size: int = 0
    time: float = field(default_factory=time.time)
    kind: str = "train"


@dataclass(frozen=True)
class BatchEvent:
    """The batch size changed by a decision of train.batch_growth.

    Attributes:
        step: Completed steps; those after them have the new size.
        batch_size: New size, sequences over all ranks.
        noise_scale: The gradient noise scale that led to it, targets.
        last_step: Step after which training will end now.
    """

    step: int
    batch_size: int
    noise_scale: float
    last_step: int
    time: float = field(default_factory=time.time)
    kind: str = "batch"


@dataclass(frozen=True)
class ValidationEvent:
    """Metrics of the validation split after `step` steps, by domain and in total.

    Attributes:
        averages: Name of an average of the weights, such as "ema-0.999" -> its "domains" and
            "total"; empty unless `validation.averages` is set.
    """

    step: int
    tokens: int
    domains: dict[str, dict[str, float]]
    total: dict[str, float]
    averages: dict[str, dict[str, Any]] = field(default_factory=dict)
    time: float = field(default_factory=time.time)
    kind: str = "validation"


@dataclass(frozen=True)
class CheckpointEvent:
    """A checkpoint became durable.

    Attributes:
        seconds: From the start of the save.
        stall_seconds: Those of them in which training stood still.
    """

    step: int
    path: str
    seconds: float
    bytes: int
    stall_seconds: float = 0.0
    time: float = field(default_factory=time.time)
    kind: str = "checkpoint"


@dataclass(frozen=True)
class SkipEvent:
    """A bad step that changed nothing.

    Attributes:
        step: The step.
        reason: One of spike_detector.REASONS.
        loss: Nats per target.
        grad_norm: Norm of the gradient before clipping.
        consecutive: Bad steps in a row, this one included.
        skipped: Bad steps in the whole run.
        loss_limit: Loss above which a step is a spike; None while spikes are not looked for.
        grad_norm_limit: The same of the norm.
    """

    step: int
    reason: str
    loss: float
    grad_norm: float
    consecutive: int
    skipped: int
    loss_limit: float | None = None
    grad_norm_limit: float | None = None
    time: float = field(default_factory=time.time)
    kind: str = "skip"


@dataclass(frozen=True)
class RollbackEvent:
    """Training returned to a checkpoint; records of later steps no longer hold.

    Attributes:
        step: Step of the checkpoint.
        first_bad: First of the bad steps.
        last_bad: Last of the bad steps.
        reason: Why the last of them was bad.
        first_sequence: First position of the data that is skipped (docs/loader.md).
        stop_sequence: First position after it.
        rollbacks: Rollbacks since a checkpoint was saved after one.
    """

    step: int
    first_bad: int
    last_bad: int
    reason: str
    first_sequence: int
    stop_sequence: int
    rollbacks: int
    time: float = field(default_factory=time.time)
    kind: str = "rollback"


@dataclass(frozen=True)
class SaveFailedEvent:
    """A checkpoint could not be written, and training went on without it.

    Attributes:
        rank: The first rank that failed.
        errno: The system's number of its error, None where there was none.
        consecutive: Failed saves in a row.
    """

    step: int
    message: str
    rank: int
    errno: int | None
    consecutive: int
    time: float = field(default_factory=time.time)
    kind: str = "save_failed"


@dataclass(frozen=True)
class MirrorEvent:
    """News of the mirror of the checkpoints.

    Attributes:
        status: "mirrored"; "skipped": `step` is not mirrored; "damaged": a mirrored
            checkpoint is not usable; "failing": the store accepts nothing at present; "ended":
            mirroring ended.
        path: Location of a mirrored checkpoint.
        seconds: Duration of its upload.
        bytes: Its size.
        waiting: Checkpoints that are not mirrored yet.
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
    | BatchEvent
    | ValidationEvent
    | CheckpointEvent
    | SkipEvent
    | RollbackEvent
    | SaveFailedEvent
    | MirrorEvent
)


class Listener(Protocol):
    """Anything that receives events, in order."""

    def on_event(self, event: Event) -> None:
        """Receive an event."""

    def close(self) -> None:
        """No more events will come."""


class EventBus:
    """Delivers each event to all listeners, in the order in which they subscribed.

    Every rank publishes the same events; only rank 0 has listeners.
    """

    def __init__(self, listeners: Iterable[Listener] = ()) -> None:
        self._listeners = list(listeners)

    def subscribe(self, listener: Listener) -> None:
        """Deliver later events to a listener too."""
        self._listeners.append(listener)

    def publish(self, event: Event) -> None:
        """Deliver an event."""
        for listener in self._listeners:
            listener.on_event(event)

    def close(self) -> None:
        """Close all listeners."""
        for listener in self._listeners:
            listener.close()


def scalars(event: Event) -> dict[str, float]:
    """The numbers of an event by flat name (`train/loss`, `validation/code/bpb`), for trackers.

    Step and time are the axis and left out, as are unknown values (None).
    """
    numbers: dict[str, float] = {}

    def walk(prefix: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                walk(prefix if name == "domains" else f"{prefix}{name}/", value)
            elif isinstance(value, (int, float)):
                numbers[prefix + name] = float(value)

    walk(
        f"{event.kind}/",
        {k: v for k, v in asdict(event).items() if k not in ("step", "time", "kind")},
    )
    return numbers


class MetricsFile:
    """Appends events to metrics.jsonl; the keys of a training record are at the top level.

    Records of steps that will be made again are removed: at construction those after
    `resume_step`, at a rollback those after its step.

    Args:
        path: The file; created where it is missing.
        resume_step: Step of the checkpoint that the run resumes from, 0 for a new run.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        self._truncate(resume_step)

    def _truncate(self, last_step: int) -> None:
        kept = [line for line in _complete_lines(self.path) if _step_of(line) <= last_step]
        temporary = self.path.with_suffix(".jsonl.tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def on_event(self, event: Event) -> None:
        """Append an event."""
        if isinstance(event, RollbackEvent):
            self._truncate(event.step)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(event), sort_keys=True) + "\n")

    def close(self) -> None:
        """Do nothing: every event is written already."""


# Keys of files written before 2026-12, and what they are called now
RENAMED_KEYS = {
    "bpb_text": "bpb",
    "bpb_code": "bpb_with_eod",
    "in_row": "consecutive",
    "first_sample": "first_sequence",
    "stop_sample": "stop_sequence",
}
RENAMED_STATUSES = {"passed over": "skipped"}  # of mirror events


def rename_old_keys(value: Any) -> Any:
    """Return a JSON value with the keys of older files replaced by today's, at any depth."""
    if isinstance(value, dict):
        return {RENAMED_KEYS.get(k, k): rename_old_keys(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rename_old_keys(item) for item in value]
    return value


def read_events(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Read all records of a metrics file, or those of one kind, under today's names.

    A torn last line (of a killed run) is skipped.
    """
    records = [rename_old_keys(json.loads(line)) for line in _complete_lines(path)]
    for record in records:
        if record.get("status") in RENAMED_STATUSES:
            record["status"] = RENAMED_STATUSES[record["status"]]
    return [record for record in records if kind is None or record["kind"] == kind]


def decided_batches(planned: BatchSchedule, path: Path) -> BatchSchedule:
    """Batch size by step of a run, with the decisions of train.batch_growth in a metrics file."""
    for record in read_events(path, "batch"):
        planned = planned.with_change(record["step"], record["batch_size"])
    return planned


def _complete_lines(path: Path) -> list[str]:
    """Lines of a metrics file without torn ones; none when there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if _step_of(line) >= 0]


def _step_of(line: str) -> int:
    """Step of a line; -1 for one that is torn."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1
